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
    for start in rows[column_of < 0]:
        # Find the shortest path to a free column, with the row before each column.
        distance, row_before = np.full(len(row_of), np.inf), np.full(len(row_of), start)
        reached = np.zeros(len(row_of), dtype=bool)
        row, shortest = start, 0.0
        while row >= 0:
            through_row = costs[row] - column_price + (shortest - row_price[row])
            shorter = ~reached & (through_row < distance)
            distance[shorter], row_before[shorter] = through_row[shorter], row
            column = int(np.where(reached, np.inf, distance).argmin())
            shortest = distance[column]
            reached[column], row = True, row_of[column]
        # Change the prices, and assign along the path.
        reached[column] = False
        row_price[start] += shortest
        row_price[row_of[reached]] += shortest - distance[reached]
        column_price[reached] -= shortest - distance[reached]
        while row != start:
            row = row_before[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    return rows, column_of
