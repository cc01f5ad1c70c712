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

Code that is not trusted runs in a process of its own:

stage         one submission judged: its cells over there, the graded cells here
session       cells run in order, functions called, what hangs is ended and the rest goes on
process       one such process, from its start to its end;  learner, shell: what runs inside
channel       messages between the two
sandbox       the walls (bubblewrap);  seccomp, limits, watch: system calls, what it may use, who looks
outputs       what a cell may show

A class is graded with nbgrader's gradebook:

grade         the run: take in, judge, record;  pool, cluster: many at once;  command: what it prints
handed_in     files as they came;  intake: clean notebooks;  inert: Markdown that can do nothing
gradebook     the instructor's folder;  database, record, replay, converting: marks entered
marks         the CSV;  feedback, feedback_page: a page for each student
authoring     labs made from solutions;  gates: what they must be;  report: the matrix of the bank
"""
