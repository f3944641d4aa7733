"""Which format where: policies, recipes, and how model states are encoded.

    policy.py            Precision and Policy, tables of formats by operation; Run and Bound, which look a row up
    policies.py          the policies of the recipes: one format everywhere, autocast's lists, quantized linear layers
    recipes.py           a recipe: a policy, an encoding for each model state, a loss scale
    state_encodings.py   how a state is stored: plain, stochastically rounded, with Kahan compensation, split, in 8 bits
"""
