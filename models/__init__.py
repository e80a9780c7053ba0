"""Ready problems, one module each: an adversary, a model, a checker, and a reference value.

With exact answers: :mod:`~models.halfspace`, :mod:`~models.union`, :mod:`~models.sphere`,
:mod:`~models.conditioned`, :mod:`~models.exponential`, :mod:`~models.discrete`, each for Pyro and for NumPyro.
:mod:`~models.reliability` has 27 problems of structural reliability with known answers and families of more, and
:mod:`~models.acas_xu` a property of published collision-avoidance networks, both for both libraries.
With trained models: :mod:`~models.digits` (Pyro and torch) and :mod:`~models.pendulum` (NumPyro and JAX).

Importing this package imports none of them: a JAX user needs no torch, and the reverse.
"""
