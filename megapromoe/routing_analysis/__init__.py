"""What routers and experts learnt: measures, figures and a report."""
