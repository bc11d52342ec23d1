"""Write what a study finds: a folder that grows, tables, figures and one page."""
