"""nflab: exact, distributed experiments with normalizer-free networks.

The modules are named after what a person does: configure (`config`, `recipes`, `cli`), read data
(`data`), train one configuration (`loop`, `train`), search over many (`tune`), record and read
back (`tracking`, `figures`).
"""
