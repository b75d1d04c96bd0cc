"""Train, score and serve text classifiers for texts longer than the model and data larger than one machine.

Importing this package is cheap: neither torch nor ray is loaded until a name that needs them is used.
"""

__version__ = "0.1.0"
