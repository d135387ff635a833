"""The folder of a training run: made, and told what made it."""

import importlib.metadata
import shutil
import subprocess
from pathlib import Path
from typing import Any

from relax.config import save_config

CONFIG_FILE = "config.yaml"


def make_run_folder(wanted: Path) -> Path:
    """Returns a new folder named `wanted`, or with -1, -2 ... where others took it.

    Raises OSError naming `run_folder` where it can't be made.
    """
    for suffix in ("", *(f"-{index}" for index in range(1, 1000))):
        folder = wanted.with_name(wanted.name + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise OSError(f"run_folder={wanted}: a file is in the way") from None
            continue
        except OSError as error:
            raise OSError(
                f"run_folder={wanted} can't be made ({error.strerror}); set run_folder "
                "to a folder that you may write to"
            ) from None
        return folder
    raise OSError(f"run_folder={wanted} and 999 after it exist; set another run_folder")


def write_provenance(config, folder: Path) -> None:
    """Keeps the resolved config, the code's revision and the libraries' versions."""
    save_config(config, folder / CONFIG_FILE)
    libraries = ("jax", "dm-haiku", "optax", "orbax-checkpoint", "grain")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    save_config({**_revision(), **versions}, folder / "versions.yaml")


def _revision() -> dict[str, Any]:
    """Returns the code's git revision and whether it was changed, if there is git."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return {"revision": None, "changed": None}
    return {
        "revision": git("rev-parse", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
