"""Tables, figures and summaries of results."""
