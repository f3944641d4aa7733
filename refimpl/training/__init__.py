"""A training run around the step: settings, data, the loop, logs and checkpoints.

    config.py               every setting of a run, checked
    setup.py                the objects that a step takes, kept together
    trainer.py, run.py      the loop over steps; a run in a folder, from start to report
    data.py, generate.py    corpora and batches; validation loss and samples
    checkpoint.py, checkpoint_states.py    files that are never half-written; model states in and out of them
    run_folder.py, metrics.py              the folder of a run, its log and picture
    cli.py, console.py, flags.py, arguments.py, program.py    what every command shares: exit codes, output, flags
    mistakes.py             known mistakes, to be injected on purpose
"""
