"""Commands, reports, benchmarks and experiments. This package imports the others; none of them imports it.

    commands/              the flags of each command
    step_inspector.py      follows one weight through a training step, with its bits
    precision_report/      what every cast of a training run did, as an HTML page
    formats/               the number formats, and how each stores a number
    recipes_table.py       the recipes and policies as tables
    loss_scale.py          the loss scales of eight projects for the same overflows
    scale_remarks.py       remarks on the last update of a loss scale
    memory/                memory of training, predicted and measured
    compare_recipes/       trains under several recipes and compares them
    experiments/           toy experiments
    python_program.py      runs somebody's Python program as Python does; audit_demo.py: a training with three mistakes
    bench/                 step times, scaling over ranks, checks on a GPU
"""
