"""From a configuration to a recorded answer: a training, a sweep, a grid."""
