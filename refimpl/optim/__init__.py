"""Model states, gradients, optimizers and the loss scale: the functions that steps 1, 3 and 4 of the algorithm call.

    layout.py           the place of each parameter in the flat buffers, and the blocks in which they are processed
    exchange.py         what a state exchanges with other ranks: on one host, nothing
    state.py            masters, weights, gradients and moments as flat buffers with named views
    gradients.py        step 3: whether all gradients are finite, their norm, and the clip coefficient
    micro_batches.py    gradient accumulation: the share of each micro-batch in the mean loss
    optimizer.py        step 4: an update rule on masters and moments
    adamw.py, sgd.py    the update rules
    schedule.py         the learning rate of each update
    loss_scale.py       the loss scale: PyTorch's rule, and the constant one
    loss_scalers.py     the rules of other projects as a table, and `make_loss_scale`
    scale_checks.py     what the settings and the saved state of a loss scale must be
"""
