"""The degradation of a batch on the device of the learner, in PyTorch, with the parameters that `draw` drew.

CPU tasks draw and send a record of a sample's parameters (`plan`); `chain` applies them to all samples at
once. Pictures of different sizes lie in the top left corner of canvases of one size, and sizes, modes and
branches are numbers on the device, so nothing waits for the host and the number of kernels does not grow with
the batch. A sample does not depend on the others.
"""
