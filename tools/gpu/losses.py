"""Compares the losses of all steps in two reports of `adapt`: losses.py REPORT REPORT BOUND"""

import json
import sys


def losses(path):
    with open(path, encoding="utf-8") as file:
        return [run["losses"] for run in json.load(file)["runs"]]


def main():
    one, other, bound = losses(sys.argv[1]), losses(sys.argv[2]), float(sys.argv[3])
    if not one or [len(run) for run in one] != [len(run) for run in other]:
        sys.exit("the reports have other runs or steps")
    pairs = [pair for runs in zip(one, other) for pair in zip(*runs)]
    if not pairs:
        sys.exit("the reports have no steps")
    # A comparison with a NaN is false.
    if not all(abs(a - b) <= bound for a, b in pairs):
        worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        sys.exit(f"{worst[0]} and {worst[1]} differ by more than {bound}")
    most = max(abs(a - b) for a, b in pairs)
    print(f"{len(pairs)} steps, losses within {most:.2e} (bound {bound})")


main()
