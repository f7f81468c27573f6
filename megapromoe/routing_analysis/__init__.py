"""Analysis of what routers and experts have learned: measures, figures and a report."""
