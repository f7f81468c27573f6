"""`megapromoe launchers`: writes the job scripts for SLURM, mpirun and one machine into a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from megapromoe import io
from megapromoe.commands.command_line import FileError, file_errors, takes_no_settings

EPILOG = """\
These are the scripts of launchers/ in the repository; each has a --help. They start the megapromoe on PATH, or that of
MEGAPROMOE_ENV or MEGAPROMOE_PYTHON. You may change the copies: a file that differs is never overwritten.

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
    """The folder of the job scripts: inside the package if it is installed, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "launchers"
    return installed if installed.is_dir() else package.parent / "launchers"


def run(options: argparse.Namespace, launch: None) -> int:
    with file_errors():
        scripts = {script.name: script.read_bytes() for script in sorted(launchers_folder().glob("*.sh"))}
        differing = [name for name, content in scripts.items() if _differs(options.folder / name, content)]
        if differing:
            raise FileError(
                f"{options.folder}: {', '.join(differing)} would be overwritten; choose another folder, or remove them"
            )
        options.folder.mkdir(parents=True, exist_ok=True)
        for name, content in scripts.items():
            path = options.folder / name
            io.write_bytes(path, content)
            # Scripts without a #! line are only sourced by the others, so they are not executable.
            path.chmod(0o755 if content.startswith(b"#!") else 0o644)
            print(path)
    return 0


def _differs(path: Path, content: bytes) -> bool:
    """Whether `path` exists with other content."""
    if not path.is_file():
        return path.exists() or path.is_symlink()
    return path.read_bytes() != content
