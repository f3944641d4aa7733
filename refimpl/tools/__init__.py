"""Reports, benchmarks and experiments. They import everything else; nothing imports them.

    step_inspector.py      one weight through the four steps, with its bits
    precision_report/      what every cast of a training run did, as a page
    formats/               what each format makes of a number
    loss_scale.py          how ten projects adapt the loss scale, step by step
    memory/                what training costs in memory, predicted and measured
    compare_recipes/       recipes side by side
    experiments/           toy experiments
    bench/                 step times, scaling over ranks, checks on a GPU
    html/, text.py         page parts, tables
"""
