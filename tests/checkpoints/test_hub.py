"""Ids of the hub, answered from a cache laid out as huggingface_hub does it."""

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

import relax
from relax.checkpoints.hub import fetch, split_hub_id
from relax.checkpoints.pretrained import find_pretrained

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def put(cache, repo_id, files, revision="main"):
    """Caches the files as a revision of a model: blobs, links to them, and a ref."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMITS[revision]
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(COMMITS[revision])
    for path in files:
        blob = repo / "blobs" / f"{revision}-{path.name}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("Qwen/Qwen2.5-0.5B", ("Qwen/Qwen2.5-0.5B", None)),
        ("owner/name@v2", ("owner/name", "v2")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("latest", None),
        ("latest@best", None),
        ("/tmp/name", None),
        ("runs/a/b", None),
        ("owner/name@", None),
        ("owner name/x", None),
    ],
)
def test_an_id_is_an_owner_and_a_name(reference, expected):
    assert split_hub_id(reference) == expected


def test_a_cached_model_is_loaded_by_its_id(save_peer, cache, tokens):
    peer = save_peer("Mistral", sliding_window=5)
    put(cache, "some-owner/some.model_1", peer.folder.iterdir())
    model = relax.load("some-owner/some.model_1")
    logits, _ = peer.forward(tokens)
    np.testing.assert_allclose(model.logits(tokens), logits, 0, 1e-4)


def test_a_revision_is_another_model(save_peer, cache, read_folder):
    first, second = save_peer("Mistral", sliding_window=5), save_peer("Llama")
    put(cache, "owner/name", first.folder.iterdir())
    put(cache, "owner/name", second.folder.iterdir(), "v2")
    windows = {}
    for at in ("", "@main", "@v2", f"@{COMMITS['main']}"):
        folder = find_pretrained(f"owner/name{at}")
        windows[at] = read_folder(folder)[0].sliding_window
    assert windows == {"": 5, "@main": 5, "@v2": None, f"@{COMMITS['main']}": 5}


def test_a_repository_of_bin_files_alone_is_loaded(
    save_peer, cache, tmp_path, read_folder, assert_same_bits
):
    torch = pytest.importorskip("torch")
    peer = save_peer("Llama")
    weights = tmp_path / "pytorch_model.bin"
    torch.save(peer.model.state_dict(), weights)
    put(cache, "owner/name", [peer.folder / "config.json", weights])
    found = read_folder(find_pretrained("owner/name"))
    assert_same_bits(found[1], read_folder(peer.folder)[1])


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin alone"])
def test_files_of_other_formats_are_not_asked_for(monkeypatch, tmp_path, safe):
    """Nor .bin files where there are safetensors."""
    there = [name for name in FILES if safe or not name.endswith(".safetensors")]
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        patterns = {
            "allow_patterns": allow_patterns,
            "ignore_patterns": ignore_patterns,
        }
        names = list(filter_repo_objects(there, **patterns))
        asked.append((repo_id, revision))
        for name in names:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fetch("owner/name", "v2") == tmp_path
    assert asked == [("owner/name", "v2")] * (1 if safe else 2)
    weights = {
        True: ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        False: ["model.safetensors.index.json", "pytorch_model-00001-of-00002.bin"],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        *weights[safe],
        "tokenizer.json",
        "tokenizer.model",
    ]


FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "consolidated.safetensors",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.gguf",
    "onnx/config.json",
    "onnx/model.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "pytorch_model-00001-of-00002.bin",
    "tokenizer.json",
    "tokenizer.model",
    "training_args.bin",
]


@pytest.mark.parametrize("reference", ["owner/absent", "owner/absent@v2"])
def test_what_is_not_cached_is_one_clear_error(cache, reference):
    with pytest.raises(
        OSError, match=f"^checkpoint={reference} is neither a fold"
    ) as e:
        relax.load(reference)
    message = str(e.value)
    assert "HF_TOKEN" in message and "\n" not in message
    assert len(message) < 500


def test_an_impossible_id_is_one_clear_error(cache):
    with pytest.raises(OSError, match=r"^checkpoint=owner/a\.\.b is neither"):
        relax.load("owner/a..b")


@pytest.mark.parametrize("reference", ["runs/nothing", "runs/nothing@best"])
@pytest.mark.parametrize("there", [True, False], ids=["runs is there", "no runs yet"])
def test_a_mistyped_path_never_asks_the_hub(monkeypatch, tmp_path, reference, there):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=f"checkpoint={reference}: no complete"):
        relax.load(reference)


def test_a_folder_of_other_models_does_not_hide_the_hub(
    cache, save_peer, monkeypatch, tmp_path
):
    put(cache, "owner/name", save_peer("Llama").folder.iterdir())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "other").mkdir(parents=True)
    assert find_pretrained("owner/name").is_relative_to(cache)


def test_a_repository_of_another_format_says_so(cache, tmp_path):
    (tmp_path / "README.md").write_text("see model.gguf")
    put(cache, "owner/gguf", [tmp_path / "README.md"])
    with pytest.raises(FileNotFoundError, match="holds neither config"):
        relax.load("owner/gguf")


def test_a_repository_in_metas_form_is_asked_for_its_own_files(monkeypatch, tmp_path):
    there = ["params.json", "consolidated.00.pth", "tokenizer.model", "LICENSE.txt"]

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        for name in filter_repo_objects(
            there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert sorted(
        path.name for path in fetch("meta-llama/Llama-2-7b", None).iterdir()
    ) == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]


def test_a_folder_here_is_taken_before_the_hub(save_peer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(save_peer("Llama").folder)
    assert str(find_pretrained("owner/name")) == "owner/name"
