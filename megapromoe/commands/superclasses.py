"""`megapromoe superclasses`: makes super-classes for the classification router from WordNet."""

from __future__ import annotations

import argparse
from pathlib import Path

from megapromoe.commands.command_line import file_errors, positive, takes_no_settings

EPILOG = """\
The classes are divided along WordNet's tree of hypernyms into groups of similar size, always in the same way.
ImageNet's classes are nouns of WordNet 3.0, which Debian's package wordnet-base has in /usr/share/wordnet.

A run with model.router=classification reads the file that --out writes: model.superclasses=FILE.

examples:
  megapromoe superclasses --synsets imagenet/train --groups 12 --out superclasses.yaml

exit codes: 0 done, 1 a file cannot be read or written, 2 the command, a synset or the database is wrong"""
JOB = False


def arguments(parser: argparse.ArgumentParser) -> None:
    takes_no_settings(parser)
    parser.add_argument(
        "--synsets",
        type=Path,
        required=True,
        metavar="PATH",
        help="the synset of each class: a file with one in each line, such as n01440764, or a folder of class folders",
    )
    parser.add_argument(
        "--groups",
        type=positive,
        required=True,
        metavar="N",
        help="number of super-classes: that of the routed experts",
    )
    parser.add_argument(
        "--wordnet",
        type=Path,
        default=Path("/usr/share/wordnet"),
        metavar="DIR",
        help="folder of a WordNet database; default: /usr/share/wordnet",
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="file to write, for model.superclasses; default: none")


def run(options: argparse.Namespace, launch: None) -> int:
    from megapromoe.config.class_groups import SUFFIXES
    from megapromoe.data.superclasses import (
        SuperclassError,
        WordNet,
        file_of_groups,
        read_synsets,
        superclasses,
        table,
    )
    from megapromoe.io import write_text

    if options.out and options.out.suffix not in SUFFIXES:
        raise SuperclassError(f"--out {options.out}: must end with {' or '.join(SUFFIXES[:2])}")
    with file_errors():
        wordnet, synsets = WordNet(options.wordnet), read_synsets(options.synsets)
        groups = superclasses(wordnet, synsets, options.groups)
    print("\n".join(table(groups, wordnet, synsets)))
    if options.out:
        source = f"{len(groups)} super-classes of {len(synsets)} classes, from WordNet's hypernyms by\n"
        source += f"megapromoe superclasses --synsets {options.synsets} --groups {options.groups}"
        with file_errors():
            write_text(options.out, file_of_groups(groups, source))
        print(f"{options.out}: use model.superclasses={options.out} model.num_experts={len(groups)}")
    return 0
