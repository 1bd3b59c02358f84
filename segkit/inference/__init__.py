"""From checkpoints to masks: soups, views, votes, and files of results.

How ``infer.py --soup --tta`` uses these modules, in order:

1. ``trained_run``: open the runs; ``Images`` are the images to predict, or a selection set.
2. ``candidates``: choose the checkpoints, views and vote to predict with, here one soup per run.
3. ``run_soups``: make the soups (``soup``), scored on the selection set, as checkpoint files.
4. ``candidate_predictor``: load each checkpoint (``model_file``) and predict the images
   (``predictor``: tiles of ``tiling``, views of ``tta``); several checkpoints vote (``voting``).
5. ``results``: write each image's files (``outputs``), keep those of an interrupted inference
   (``origin``), then combine the masks into CSV or COCO files; ``--pseudo`` uses ``pseudo``.
6. ``scoring``: with labels, count and compare the candidates for ``scores.json`` and the table.
"""
