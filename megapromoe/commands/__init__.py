"""The commands of `megapromoe`, one file each: EPILOG, JOB, `arguments(parser)` and `run(options, launch)`.

`cli.COMMANDS` lists them with their summaries; `command_line.py` and `options.py` hold code that several commands use.
"""
