"""Text with placeholders."""

from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.config.template import Placeholder, Template


def _encode(value: str) -> str:
    """Percent-encode as strictly as possible."""
    return quote(value, safe="")


def _found(placeholder: Placeholder) -> str:
    """Find a value for any placeholder."""
    return f"<{placeholder.kind}/{placeholder.name}>"


def test_template_has_parts() -> None:
    """A text is split into literal text and placeholders."""
    template = Template.parse("https://a.tv/{rest}?q={query.slot[]}&h={header.X-Id}{viewer}")

    assert (
        "https://a.tv/",
        Placeholder("rest"),
        "?q=",
        Placeholder("query", "slot[]"),
        "&h=",
        Placeholder("header", "x-id"),
        Placeholder("viewer"),
    ) == template.parts


def test_template_tells_what_it_needs() -> None:
    """A template names its query parameters, and tells how it begins and whether it needs rest."""
    template = Template.parse("{query.tag}/{rest}?a={query.a}&ip={client_ip}")

    assert frozenset({"tag", "a"}) == template.query_names
    assert template.uses_rest
    assert template.starts_with_placeholder
    assert not template.is_static


def test_text_without_placeholder_is_static() -> None:
    """A text without placeholders, the empty one too, is the same for every request."""
    assert Template.parse("https://a.tv/vast").is_static
    assert Template.parse("").is_static
    assert not Template.parse("").starts_with_placeholder
    assert "" == Template.parse("").render(_found, _encode)


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("{a}", "{{a}}"),
        ("{query.tag}", "{{query.tag}}"),
        ('{"a":1}', '{{"a":1}}'),
        ("[CACHEBUSTING]", "[CACHEBUSTING]"),
        ("%%CACHEBUSTER%%", "%%CACHEBUSTER%%"),
        ("${CACHEBUSTER}", "${CACHEBUSTER}"),
        ("a${", "a${"),
        ("$5", "$5"),
    ],
)
def test_literal_text_stays(literal: str, text: str) -> None:
    """Doubled braces are braces, and macros of ad servers are text."""
    template = Template.parse(text)

    assert template.is_static
    assert literal == template.render(_found, _encode)


def test_braces_may_stand_around_a_placeholder() -> None:
    """Three braces are a literal one and a placeholder."""
    assert "{1}" == Template.parse("{{{viewer}}}").render(lambda _: "1", _encode)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("'{cb}' is no placeholder (Did you mean {query.cb}?", "{cb}"),
        ("'{qery.tag}' is no placeholder (Did you mean {query.tag}?", "{qery.tag}"),
        ("'{headers.X-Id}' is no placeholder (Did you mean {header.X-Id}?", "{headers.X-Id}"),
        ("'{clientip}' is no placeholder (Did you mean {client_ip}?", "{clientip}"),
        ("'{viewer.id}' is no placeholder (Did you mean {viewer}?", "{viewer.id}"),
        ("'{query.}' is no placeholder (Write {query.NAME}, {header.NAME}", "{query.}"),
        ("'{query.a b}' is no placeholder", "{query.a b}"),
        ("'{header.a b}' is no placeholder", "{header.a b}"),
        ("""'{"a":1}' is no placeholder (Write {query.NAME}""", '{"a":1}'),
        ("'{}' is no placeholder", "{}"),
        ("a single '{' belongs to no placeholder", "{"),
        ("a single '}' belongs to no placeholder", "a}"),
        ("a single '{' belongs to no placeholder", "{query.{tag}}"),
    ],
)
def test_wrong_brace_is_explained(message: str, text: str) -> None:
    """A brace that begins no placeholder is refused, with the nearest right one."""
    with pytest.raises(ValueError, match="write '") as caught:
        Template.parse(text)

    assert str(caught.value).startswith(message)


def test_value_within_the_text_is_encoded() -> None:
    """A value inside a URL is encoded, so that it cannot add a parameter."""
    template = Template.parse("https://a.tv/?q={query.q}")

    assert "https://a.tv/?q=1%262" == template.render(lambda _: "1&2", _encode)


def test_value_that_begins_the_text_is_not_encoded() -> None:
    """A value that is the URL itself is put in as it is; the same value later on is not."""
    template = Template.parse("{query.tag}&again={query.tag}")

    assert "//x?a&again=%2F%2Fx%3Fa" == template.render(lambda _: "//x?a", _encode)


def test_rest_is_not_encoded() -> None:
    """What ``{rest}`` stands for is a piece of a URL already."""
    template = Template.parse("https://a.tv/{rest}")

    assert "https://a.tv/b/c%20d" == template.render(lambda _: "b/c%20d", _encode)


def test_values_are_put_in_once() -> None:
    """A value that looks like a placeholder is not replaced again."""
    template = Template.parse("a {query.q} {viewer}")

    assert "a {viewer} {viewer}" == template.render(lambda _: "{viewer}", str)


def test_template_is_shown_as_it_was_written() -> None:
    """A template's text, and a placeholder's, is what the operator wrote."""
    assert "a{{{query.b}" == str(Template.parse("a{{{query.b}"))
    assert "{query.b}" == str(Placeholder("query", "b"))
    assert "{viewer}" == str(Placeholder("viewer"))


@given(st.text(alphabet=st.sampled_from("{}$.[]%aquery_headwclintps \n\x00é")))
def test_any_text_is_a_template_or_a_value_error(text: str) -> None:
    """Any text gives a template that can be rendered, or ValueError."""
    try:
        template = Template.parse(text)
    except ValueError:
        return

    assert isinstance(template.render(_found, _encode), str)


@given(st.text())
def test_doubled_braces_give_any_text_back(text: str) -> None:
    """Any text with its braces doubled stands for itself, but for ``${``."""
    plain = text.replace("$", "")
    template = Template.parse(plain.replace("{", "{{").replace("}", "}}"))

    assert plain == template.render(_found, _encode)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_encoded_value_is_found_again(value: str) -> None:
    """Whatever a request's value is, decoding the URL gives it back."""
    url = Template.parse("x={query.a}").render(lambda _: value, _encode)

    assert value == unquote(url.removeprefix("x="))
