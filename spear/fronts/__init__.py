"""Convolutional front ends, and whatever else computes features: inputs from the features that a head gives away.

With ReLU's zeros and the places of the maxima fixed, a front is affine in its input, and so are the gradients of its
own parameters, given dLoss/dfeatures of each sample: linear equations that outnumber the unknowns (`search`, `check`).
"""
