// The pictures of curves are white, so the page is too.
() => document.body.classList.remove("dark");
