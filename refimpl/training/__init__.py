"""A training run: settings, data, the loop over steps, logs and checkpoints.

    config.py, config_file.py the settings of a run: flags as given, and all of them, checked; settings from a file
    schema.py                 checks of data read from JSON
    setup.py, init_from.py    the start of a run: the objects that a step takes, random numbers, faults; weights of other runs
    trainer.py, run.py, run_report.py           the loop over steps; a run in a folder; what it prints
    data.py, ngrams.py        corpora and batches; the losses that a model must beat
    tokenizer.py, token_cache.py  bytes or a tokenizer.json: text as token ids and back; ids that are kept in a file
    evaluate.py, sampling.py  the loss of a model on a text; text that a model writes
    checkpoint.py, checkpoint_states.py         files that are never half-written; model states in and out of them
    huggingface/              reading and writing Hugging Face folders; GGUF files in
    resume.py                 what a checkpoint says of its run; which settings may change when it is resumed
    kept_checkpoints.py       the best checkpoint and the last ones; the space that they need
    log_writers.py            the log for TensorBoard and for Weights & Biases
    run_folder.py, folder_lock.py, metrics.py, plots.py   the folder of a run, its lock, its log; the picture of logs
    memory_limits.py, activation_memory/        whether a run fits into memory; formulas for its activations
    stopping.py, non_finite.py    when a run stops, and advice; where Inf or NaN first appears in a step
    cli.py, console.py, signals.py, program.py  the frame of every command: exit codes, output, Ctrl-C
    columns.py, progress_bar.py   lines and tables that fit the terminal; progress on a terminal and in a file
    arguments.py, flags.py        the parser, the flags of a run
    outputs.py, pictures.py, palette.py, html/  the files of reports, pictures as PNG, their colors, and parts of HTML pages
    machine.py                                  the processor that a run took place on
"""
