"""What an HTML file is made of."""

from html.parser import HTMLParser


class Tags(HTMLParser):
    """Collects what a report loads and where its links lead, and asserts that every tag that is opened is closed."""

    def __init__(self, report):
        super().__init__()
        self.open, self.sources, self.links, self.ids = [], [], [], []
        self.feed(report)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.sources += [found["src"]] if "src" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
