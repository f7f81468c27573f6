"""`megapromoe launchers`: writes the job scripts and the files for Kubernetes and SkyPilot into a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from megapromoe import io
from megapromoe.commands.command_line import FileError, file_errors, takes_no_settings

EPILOG = """\
These are the files of launchers/ in the repository; each script has a --help. They start the megapromoe on PATH, or
that of MEGAPROMOE_ENV or MEGAPROMOE_PYTHON. You may change the copies: a file that differs is never overwritten.

example:
  megapromoe launchers launchers
  sbatch --nodes=4 launchers/promoe_xl.sh data.source=latents data.path=latents/train

exit codes: 0 written, 1 a file with other content exists, or the folder cannot be written, 2 the command is wrong"""
JOB = False


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "megapromoe launchers DIR"
    takes_no_settings(parser)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write to; created if needed")


def launchers_folder() -> Path:
    """The folder of these files: inside the package if it is installed, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "launchers"
    return installed if installed.is_dir() else package.parent / "launchers"


def run(options: argparse.Namespace, launch: None) -> int:
    with file_errors():
        root = launchers_folder()
        files = sorted(path for end in ("sh", "yaml") for path in root.rglob(f"*.{end}"))
        contents = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
        differing = [name for name, content in contents.items() if _differs(options.folder / name, content)]
        if differing:
            raise FileError(
                f"{options.folder}: {', '.join(differing)} would be overwritten; choose another folder, or remove them"
            )
        for name, content in contents.items():
            path = options.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            io.write_bytes(path, content)
            # Files without a #! line are only read or sourced, so they are not executable.
            path.chmod(0o755 if content.startswith(b"#!") else 0o644)
            print(path)
    return 0


def _differs(path: Path, content: bytes) -> bool:
    """Whether `path` exists with other content."""
    if not path.is_file():
        return path.exists() or path.is_symlink()
    return path.read_bytes() != content
