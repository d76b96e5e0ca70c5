"""Baselines on the same scaled features as the networks: linear models, forests and boosting.

`fit.BASELINES` fits them. Each is fitted to the training and validation patients together; what a
network would choose on the validation part is chosen by cross-validation among these patients. A
fitted baseline is a module that takes the inputs of a network and returns logits for an objective,
so it is kept and used like a network.
"""
