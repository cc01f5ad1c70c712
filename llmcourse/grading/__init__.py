"""Graders that are themselves graded.

plain         the values that may pass between a learner's code and its judge
perform       one call of a learner's function: guard bands, written arguments, costs, what it raised
exercise      an exercise with its checks, named mistakes and correct alternatives
trial         what a check works with: fresh inputs, calls, comparisons, oracles
compare       numbers against a float64 reference
verdict       the judgement, its diagnosis and how it reads
cost          bytes saved for backward, largest intermediate, launches, leaks
distribution  random outputs, judged with a stated false-alarm rate
bank          every mistake rejected and named, every alternative accepted; the matrix of both

For instructors: `sandbox`, `channel`, `learner` and `session` run code that is not trusted;
`authoring`, `intake`, `gradebook`, `record` and `feedback` are nbgrader's side.
"""
