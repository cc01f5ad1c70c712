"""The operations, one family a file. Each is a `Function` on NumPy arrays that says what it saves.

elementwise   add, sub, mul, div, neg, pow, exp, log, relu, tanh, sigmoid; broadcasting and its backward
reduce        sum, mean, max
shape         reshape, transpose, broadcast_to, getitem, concat, stack
matmul        vectors, matrices, batches
softmax       softmax, log_softmax, cross_entropy
"""
