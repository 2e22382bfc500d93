"""What a model would do on hardware one need not have: capacity, time and the layouts to choose from.

It predicts; it must not load weights nor start ranks.
"""
