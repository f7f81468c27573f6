"""The commands of `megapromoe`, one file each: SUMMARY, EPILOG, JOB, `arguments(parser)` and `run(options, launch)`."""
