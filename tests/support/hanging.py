"""`megapromoe` with a rank that hangs at a known place."""

import os
import sys
import threading

from megapromoe.cli import main


def wait_for_ever(*_, **__) -> None:
    threading.Event().wait()


def hang_at(rank: int, step: int) -> None:
    """Runs the command line; `rank` hangs when it asks for the data of `step`, of step 0 when it opens the data."""
    if int(os.environ["RANK"]) == rank:
        import megapromoe.training.loop as loop

        if step == 0:
            loop.open_dataset = wait_for_ever
        else:
            real = loop.prefetch

            def batches(*arguments, **options):
                for number, batch in enumerate(real(*arguments, **options), 1):
                    if number == step:
                        wait_for_ever()
                    yield batch

            loop.prefetch = batches
    sys.exit(main())
