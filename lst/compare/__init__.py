"""Controlled comparisons: the paper's models side by side, under the same compute or the same data.

arms      the models by name: baseline, BPE, the patching strategies
study     which arms, at which budgets, with which seeds; one run after the other
report    the runs as tables, curves and a page of text
"""
