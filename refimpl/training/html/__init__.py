"""Parts of the HTML pages: layout, figures."""
