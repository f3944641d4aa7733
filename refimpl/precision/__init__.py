"""Which format where: policies, recipes, and how model states are encoded.

    policy.py            Precision and Policy, tables of formats by operation; one format everywhere, and autocast's tables
    policy_checks.py     the check of a policy's rows, keys and formats
    policy_variants.py   policies with other attention, other accumulators, quantized products
    context.py           Run and OpPrecision: what an operation is handed during a run
    recipes.py           a recipe: a policy, an encoding for each model state, a loss scale
    state_encodings.py   how a state is stored: plain, stochastically rounded, with Kahan compensation, split, in 8 bits
"""
