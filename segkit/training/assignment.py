"""The assignment of rows to columns of least total cost, by shortest augmenting paths."""

import numpy as np


def assign(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows and columns, none used twice, whose total cost is least.

    Jonker and Volgenant 1987, https://doi.org/10.1007/BF02278710; for rectangular matrices Crouse
    2016, https://doi.org/10.1109/TAES.2016.140952

    Args:
        costs: (rows, columns), finite.

    Returns:
        Rows and their columns, ``min(rows, columns)`` of each, in order of rows.

    Raises:
        ValueError: A cost is NaN or infinite.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if not np.isfinite(costs).all():
        raise ValueError("costs: has NaN or infinity, expected finite numbers")
    if costs.shape[0] > costs.shape[1]:
        columns, rows = assign(costs.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    rows = np.arange(len(costs))
    if not costs.size:
        return rows, rows
    # The dual variables: costs - row_price[:, None] - column_price >= 0, and 0 for assigned pairs.
    row_price, column_price = costs.min(1), np.zeros(costs.shape[1])
    column_of, row_of = np.full(len(costs), -1), np.full(costs.shape[1], -1)
    for row, column in enumerate(costs.argmin(1)):
        if row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    for row in rows[column_of < 0]:
        _augment(costs, row_price, column_price, column_of, row_of, row)
    return rows, column_of


def _augment(
    costs: np.ndarray,
    row_price: np.ndarray,
    column_price: np.ndarray,
    column_of: np.ndarray,
    row_of: np.ndarray,
    start: int,
) -> None:
    """Assign row ``start``, along the shortest path to a free column, and change the prices."""
    distance = np.full(len(row_of), np.inf)  # of columns that are not reached
    reached: list[tuple[int, float]] = []
    price = column_price.copy()
    row_before = np.full(len(row_of), start)
    row, shortest = start, 0.0
    while True:
        through_row = costs[row] - price
        through_row += shortest - row_price[row]
        shorter = through_row < distance
        np.copyto(distance, through_row, where=shorter)
        np.copyto(row_before, row, where=shorter)
        column = int(distance.argmin())
        shortest = float(distance[column])
        if row_of[column] < 0:
            break
        reached.append((column, shortest))
        distance[column], price[column] = np.inf, -np.inf  # never shorter again
        row = row_of[column]
    row_price[start] += shortest
    for earlier, length in reached:
        row_price[row_of[earlier]] += shortest - length
        column_price[earlier] -= shortest - length
    while True:
        row = row_before[column]
        row_of[column], column_of[row], column = row, column, column_of[row]
        if row == start:
            return
