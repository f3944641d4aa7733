"""Model states, gradients, optimizers and the loss scale: what steps 1, 3 and 4 of the algorithm call.

    state.py         masters, weights, gradients and moments as flat buffers with named views
    gradients.py     step 3: are all gradients finite, what is their norm, how much to clip
    optimizer.py     AdamW and SGD on the masters, and the learning rate's schedule
    loss_scale.py    the loss scale: PyTorch's rule, and those of other projects
"""
