"""Finds which subscribers may see a row, without evaluating each one.

A rule is followed by reading, in this order:

``compiler``    text -> ``Predicate`` -> (split) tests -> ``Plan`` -> ``BoundPredicate``
``formula``     ``Test``: one condition, in the process and in SQL; AND and OR of them
``plan``        ``Plan``, and its ``Specialization`` for callers that differ only in values
``index``       from a row to the callers it may concern, by ``index_paths`` over ``index_keys``
``evaluation``  ``Evaluation``: rows (``row_evaluation``), open tests and keys, and their questions
``batch_query`` ``Question``: what PostgreSQL must answer; ``before_state``: for deleted rows
"""
