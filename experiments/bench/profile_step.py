"""Where the time of ReLax's training step goes, by kind of work and by operation.

At every instant of the trace the time is divided over the operations in flight, so that
the figures add up to the step's wall time; what no operation accounts for is dispatch
and waiting. The step is that of train_step.yaml, with the same overrides.
"""

import gzip
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from common import load, use_cores
from hlo import CONTAINERS, Operation, parse
from relax_side import TrainStep

TOP = 30
IDLE = "dispatch and waiting"

# The first that fits: a part of JAX's path of the operation, of a file and function on
# its stack, or, after a %, of its own name.
KINDS = (
    ("/mlp/gate_proj", "mlp projections"),
    ("/mlp/up_proj", "mlp projections"),
    ("/mlp/down_proj", "mlp projections"),
    ("/self_attn/q_proj", "qkv projections"),
    ("/self_attn/k_proj", "qkv projections"),
    ("/self_attn/v_proj", "qkv projections"),
    ("/self_attn/o_proj", "o projection"),
    ("relax/ops/rope.py", "rope"),
    ("attention.py:attention", "attention"),
    ("blocked_attention.py", "attention"),
    ("relax/ops/norm.py", "norms"),
    ("relax/ops/feed_forward.py", "gate"),
    ("relax/ops/logprobs.py", "unembedding and loss"),
    ("relax/losses.py", "unembedding and loss"),
    ("layers.py:lookup", "embedding"),
    ("optax/transforms/_clipping.py", "clip"),
    ("optax/", "optimizer"),
    ("%copy", "zeros and copies of the loops' buffers"),
    ("%wrapped_broadcast", "zeros and copies of the loops' buffers"),
    ("dynamic_update_slice", "activations kept for the backward pass"),
    ("dynamic_slice", "activations kept for the backward pass"),
    ("relax/steps.py:one_step", "the step's own sums and metrics"),
)


class Interval(NamedTuple):
    """One run of an operation, in microseconds."""

    name: str
    start: float
    end: float


def main(overrides: list[str]) -> None:
    """Profiles the step of train_step.yaml and prints where its time goes."""
    config = load("train_step", overrides)
    use_cores(config["threads"])
    step = TrainStep(config)
    for _ in range(config["warmup"]):
        step.run(config["steps"])
    start = time.perf_counter()
    step.run(config["steps"])
    seconds = (time.perf_counter() - start) / config["steps"]
    report(step, trace(step, config["steps"]), config["steps"], seconds)


def trace(step: TrainStep, steps: int) -> list[dict]:
    """Returns the trace events of `steps`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            step.run(steps)
        (path,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(path) as file:
            return json.load(file)["traceEvents"]


def report(step: TrainStep, events: list[dict], steps: int, seconds: float) -> None:
    """Prints the kinds of work and the longest operations, most expensive first."""
    operations = parse(step.program)
    intervals = list(find_intervals(events, operations))
    runs = Counter(interval.name for interval in intervals)
    spent = divide(intervals)
    kinds = Counter()
    for name, time_spent in spent.items():
        kinds[IDLE if name == IDLE else kind_of(operations[name])] += time_spent
    total = sum(spent.values())
    print(f"{total / steps / 1e3:.1f} ms/step traced, {seconds * 1e3:.1f} untraced")
    for kind, time_spent in kinds.most_common():
        print(f"{time_spent / total:6.1%} {time_spent / steps / 1e3:8.2f} ms  {kind}")
    print("\nlongest operations")
    for name, time_spent in spent.most_common(TOP):
        text = name if name == IDLE else describe(operations[name])
        print(
            f"{time_spent / total:6.1%} {time_spent / steps / 1e3:8.2f} ms "
            f"{runs[name] / steps:5.0f} x {text}"
        )


def find_intervals(
    events: Iterable[dict], operations: Mapping[str, Operation]
) -> Iterable[Interval]:
    """Yields the runs of operations; those that go on after their dispatch, to its end.

    Loops and calls, which hold others, are left out.
    """
    starts, ends = defaultdict(list), defaultdict(list)
    for event in events:
        name = event.get("name", "")
        if event.get("ph") != "X":
            continue
        if name.startswith("end: "):
            ends[name.removeprefix("end: ")].append(event["ts"])
        elif name in operations and operations[name].opcode not in CONTAINERS:
            starts[name].append((event["ts"], event["ts"] + event["dur"]))
    for name, spans in starts.items():
        spans.sort()
        limits = [span[0] for span in spans[1:]] + [float("inf")]
        for (start, dispatched), limit in zip(spans, limits, strict=True):
            own = [end for end in ends[name] if start <= end <= limit]
            yield Interval(name, start, max(dispatched, *own, dispatched))


def divide(intervals: list[Interval]) -> Counter:
    """Returns microseconds per operation, those of none as IDLE, start to end."""
    edges = [(interval.start, 1, interval.name) for interval in intervals]
    edges += [(interval.end, -1, interval.name) for interval in intervals]
    edges.sort()
    spent, running, before = Counter(), Counter(), edges[0][0]
    for at, change, name in edges:
        active = running.total()
        if active:
            for other, count in running.items():
                spent[other] += (at - before) * count / active
        else:
            spent[IDLE] += at - before
        before = at
        running[name] += change
        if not running[name]:
            del running[name]
    return spent


def kind_of(operation: Operation) -> str:
    """Returns what an operation is for, and whether forward or backward."""
    places = [operation.path, f"%{operation.name}"]
    places += [f"{frame.file}:{frame.function}" for frame in operation.frames]
    for part, kind in KINDS:
        if any(part in place for place in places):
            return kind + direction(operation)
    return "other" + direction(operation)


def direction(operation: Operation) -> str:
    """Returns which pass an operation belongs to, as a suffix."""
    if "transpose(" in operation.path:
        return ", backward"
    return ", forward" if "jvp(" in operation.path else ""


def describe(operation: Operation) -> str:
    """Returns name, shape, kind and source of an operation."""
    path = "/".join(operation.path.split("/")[-3:])
    frame = operation.source()
    place = f"{Path(frame.file).name}:{frame.line}" if frame else ""
    return f"{operation.name} {operation.shape} {path}{direction(operation)} {place}"


if __name__ == "__main__":
    main(sys.argv[1:])
