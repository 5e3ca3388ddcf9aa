"""The dashboard in a real browser, on a real server with a key: what it shows is what the API says, for everybody, and nothing else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Visit, chromium, find_chromium, visit
from servers import Running, running, write_adapters, write_talking_base

from moa_serve.train.data import Example
from moa_serve.train.prompts import prompt_text

FAMILIES = ("soft", "sparse_fn", "mola_layerwise", "partial", "lora")
KEY = "the-key-of-the-dashboard"
HEADERS = {"Authorization": f"Bearer {KEY}"}
HOSTILE = "<img src=x onerror=\"document.body.textContent='broken'\"><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    find_chromium()
    folder = tmp_path_factory.mktemp("dashboard")
    write_talking_base(folder / "base")
    write_adapters(folder / "adapters", *FAMILIES)
    (folder / "adapters" / "half").mkdir()
    (folder / "adapters" / "half" / "adapter.json").write_text("{}")
    with running(folder, env={"MOA_API_KEY": KEY}) as started:
        for family in (*FAMILIES, "base"):
            complete(started, family, "so many words to begin with", max_tokens=20)
        yield started


@pytest.fixture(scope="module")
def browser(server: Running) -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def seen(browser: Any, server: Running) -> Iterator[Visit]:
    """The page, opened by somebody who has typed the key."""
    with visit(browser, server.url) as found:
        enter(found)
        yield found
        found.check()


def enter(found: Visit, view: str = "live") -> None:
    found.page.add_init_script(f"sessionStorage.setItem('moa-serve key', {json.dumps(KEY)})")
    found.page.goto(f"{found.url}/dashboard#{view}")
    found.page.locator("#adapters tr").first.wait_for(state="attached")


def get(server: Running, path: str) -> Any:
    response = httpx.get(f"{server.url}/{path}", headers=HEADERS)
    assert response.status_code == 200, response.text
    return response.json()


def complete(server: Running, model: str, prompt: str, **more: Any) -> Any:
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12, **more}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def ask(found: Visit, *models: str, prompt: str, **fields: str) -> None:
    """Fill the playground's form and run it to the end."""
    page = found.page
    page.get_by_label("Completion").check()
    page.locator("#prompt").fill(prompt)
    for place, model in enumerate(models):
        page.locator(f"#model-{place}").select_option(model)
    for field, value in (
        {"max-tokens": "12", "temperature": "0"} | {name.replace("_", "-"): value for name, value in fields.items()}
    ).items():
        page.locator(f"#{field}").fill(value)
    page.locator("#run").click()
    for place in range(len(models)):
        page.locator(".pane-state").nth(place).get_by_text("ended").wait_for()


def colours(found: Visit, values: list[float], start: float, end: float) -> list[str]:
    """What the page's own scale makes of values, as computed styles say it."""
    script = """async ([values, from, to]) => {
        const { scaleOf } = await import("/dashboard/scales.js");
        const scale = scaleOf({ from, to });
        return values.map((value) => {
            const hex = scale.at(value).light;
            return `rgb(${[1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).join(", ")})`;
        });
    }"""
    shown: list[str] = found.page.evaluate(script, [values, start, end])
    return shown


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class TestKey:
    def test_a_wrong_key_is_asked_again_in_the_servers_words(self, browser: Any, server: Running) -> None:
        with visit(browser, server.url) as found:
            page = found.page
            page.goto(f"{server.url}/dashboard")
            page.locator("#key-dialog").wait_for()
            page.locator("#key-input").fill("another-key")
            page.keyboard.press("Enter")
            page.locator("#key-message").get_by_text("the API key is missing or wrong").wait_for()
            assert not page.locator("#adapters tr").count()
            page.locator("#key-input").fill(KEY)
            page.get_by_role("button", name="Use this key").click()
            page.locator("#adapters").get_by_text("sparse_fn").wait_for()
            assert not page.locator("#key-dialog").is_visible()
            assert page.locator("#notice").is_hidden()
            page.reload()
            page.locator("#adapters").get_by_text("sparse_fn").wait_for()
            assert page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
            assert not [url for url in found.asked if KEY in url]
            found.check("status of 401")

    def test_who_does_not_type_a_key_is_left_alone_and_told(self, browser: Any, server: Running) -> None:
        with visit(browser, server.url) as found:
            page = found.page
            page.goto(f"{server.url}/dashboard")
            page.locator("#key-dialog").wait_for()
            page.keyboard.press("Escape")
            page.locator("#notice").get_by_text("behind an API key").wait_for()
            page.wait_for_timeout(2500)  # a poll later
            assert not page.locator("#key-dialog").is_visible()
            assert page.locator("#health").inner_text() == "ready"
            page.get_by_role("button", name="API key").click()
            assert page.locator("#key-dialog").is_visible()


class TestLive:
    def test_tiles_and_adapters_say_what_the_server_says(self, seen: Visit, server: Running) -> None:
        page = seen.page
        for _ in range(3):
            complete(server, "soft", "traffic for the page", max_tokens=20)
        page.locator(".tile-number").first.get_by_text(re.compile("[1-9]")).wait_for()
        tiles = dict(zip(page.locator(".tile h3").all_inner_texts(), page.locator(".tile-value").all_inner_texts(), strict=True))
        assert set(tiles) == {
            "Requests", "Tokens", "Time to first token", "Between tokens", "Running rows", "KV cache held", "Experts skipped",
            "Engine step",
        }  # fmt: skip
        for name, unit in (
            ("Requests", "/s"),
            ("Tokens", "/s"),
            ("Time to first token", "s"),
            ("Between tokens", "s"),
            ("Engine step", "s"),
        ):
            assert re.search(rf"[1-9].*{unit}$", tiles[name], re.DOTALL), (name, tiles[name])
        assert all(path for path in (line.get_attribute("d") for line in page.locator(".tile:first-child .spark-0").all()))
        listed = {item["id"]: item for item in get(server, "v1/adapters")["data"]}
        assert set(listed) == {*FAMILIES, "half"}
        for name, item in listed.items():
            row = page.locator("#adapters tr").filter(has=page.get_by_role("rowheader").filter(has_text=name))
            row = row.first
            assert row.locator(".pill").inner_text() == item["state"]
            assert row.locator(".tier.on").all_inner_texts() == item["tiers"]
            if item["error"]:
                assert item["error"] in row.locator(".problem").inner_text()
        assert page.locator("#base").inner_text().startswith("base · ")

    def test_what_happens_to_adapters_is_told(self, seen: Visit) -> None:
        seen.page.locator("#events").get_by_text("was loaded").first.wait_for()

    def test_a_server_that_goes_away_is_told(self, browser: Any, server: Running) -> None:
        with visit(browser, server.url) as found:
            enter(found)
            found.page.context.set_offline(True)
            found.page.locator("#health.bad").wait_for()
            found.page.locator("#notice").get_by_text("cannot be reached").wait_for()
            found.page.context.set_offline(False)
            found.page.locator("#health.good").wait_for()
            found.page.locator("#notice").wait_for(state="hidden")


class TestExperts:
    @pytest.mark.parametrize("name", ["soft", "sparse_fn", "mola_layerwise", "partial"])
    def test_every_cell_is_the_apis_number(self, seen: Visit, server: Running, name: str) -> None:
        page = seen.page
        page.goto(f"{server.url}/dashboard#experts/{name}")
        page.locator("#experts-map td[data-at]").first.wait_for()
        report = get(server, f"v1/adapters/{name}/experts")
        page.locator("#experts-facts").get_by_text(report["revision"][:12]).wait_for()
        for measure in ("weight", "selected", "computed"):
            page.locator(f"#experts-measure input[value={measure}]").check(force=True)
            cells = page.evaluate(
                """() => [...document.querySelectorAll("#experts-map tbody tr")].flatMap((row) =>
                    [...row.querySelectorAll("td:not(.mean)")].map((cell, layer) =>
                        [row.cells[0].textContent, layer, cell.dataset.value ?? null]))"""
            )
            expected = {(e["name"], layer["layer"]): e[measure] for layer in report["layers"] for e in layer["experts"]}
            assert {(expert, layer): float(value) for expert, layer, value in cells if value is not None} == expected
            values = list(expected.values())
            assert len(set(values)) > 1 or measure != "weight"
        assert f"{report['tokens']}" in page.locator("#experts-facts").inner_text()

    def test_a_cell_tells_all_it_knows_to_pointer_and_keyboard(self, seen: Visit, server: Running) -> None:
        page = seen.page
        page.goto(f"{server.url}/dashboard#experts/sparse_fn")
        cell = page.locator("#experts-map td[data-at]").first
        cell.hover()
        assert re.search(r"Q · layer 0 weight 0\.\d\d · kept [\d.]+ % · computed", page.locator("#experts-map .readout").inner_text())
        told = page.locator("#experts-map .readout").inner_text()
        page.wait_for_timeout(2500)  # a poll later
        assert page.locator("#experts-map .readout").inner_text() == told
        cell.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.dataset.at") == "1 1"
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("K, layer 1: weight ")
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement.dataset.at") == "1 2"

    def test_an_adapter_without_a_router_says_so_in_the_servers_words(self, browser: Any, server: Running) -> None:
        with visit(browser, server.url) as found:
            enter(found, "experts/lora")
            answer = httpx.get(f"{server.url}/v1/adapters/lora/experts", headers=HEADERS)
            assert answer.status_code == 400
            found.page.locator("#experts-error").get_by_text(answer.json()["error"]["message"]).wait_for()
            found.check("status of 400")


class TestPlayground:
    PROMPT = "a <b>bold</b> prompt & more"

    def test_both_streams_are_the_apis_text_and_every_token_has_its_colour(self, seen: Visit, server: Running) -> None:
        page = seen.page
        page.goto(f"{server.url}/dashboard#playground")
        # Copied inside of the page: the browser need not keep for others what a page reads piece by piece.
        page.evaluate(
            """() => {
                const fetched = window.fetch;
                window.streams = [];
                window.fetch = async (...asked) => {
                    const response = await fetched(...asked);
                    if (response.url.endsWith("/v1/completions")) window.streams.push(response.clone().text());
                    return response;
                };
            }"""
        )
        ask(seen, "sparse_fn", "soft", prompt=self.PROMPT)
        page.locator("#colour-stretch").uncheck()
        usages = {}
        for stream in page.evaluate("() => Promise.all(window.streams)"):
            last = json.loads(stream.split("data: ")[-2])
            usages[last["model"]] = last["usage"]["moa"]
        for place, model in enumerate(("sparse_fn", "soft")):
            answer = complete(server, model, self.PROMPT, moa={"return_routing": True})
            choice = answer["choices"][0]
            pane = page.locator(".pane").nth(place)
            assert pane.locator(".answer").evaluate("(node) => node.textContent") == choice["text"]
            experts, tokens = choice["moa"]["routing"]["experts"], choice["moa"]["routing"]["tokens"]
            assert pane.locator(".token").count() == len(tokens) == answer["usage"]["completion_tokens"]
            for expert, layer in (("expert DOWN", 1), ("expert Q", None), ("mean", None)):
                page.locator("#colour-expert").select_option(expert)
                page.locator("#colour-layer").select_option("all" if layer is None else str(layer))
                wanted = [
                    mean(
                        [
                            weight
                            for index, (names, row) in enumerate(zip(experts, token["weights"], strict=True))
                            for name, weight in zip(names, row, strict=True)
                            if layer in (None, index) and expert in ("mean", f"expert {name}")
                        ]
                    )
                    for token in tokens
                ]
                shown = [float(value) for value in pane.locator(".token").evaluate_all("(all) => all.map((one) => one.dataset.weight)")]
                assert shown == pytest.approx(wanted, abs=1e-4)
                painted = pane.locator(".token").evaluate_all("(all) => all.map((one) => getComputedStyle(one).backgroundColor)")
                assert painted == colours(seen, wanted, 0, 1)
            done, skipped = (usages[model][f"evaluations_{what}"] for what in ("done", "skipped"))
            facts = pane.locator(".pane-facts").inner_text()
            assert f"Experts skipped\n{100 * skipped / (done + skipped):.0f} %" in facts
            assert "First token" in facts

    def test_a_token_shows_every_expert_of_every_layer(self, seen: Visit, server: Running) -> None:
        page = seen.page
        page.goto(f"{server.url}/dashboard#playground")
        ask(seen, "sparse_fn", "base", prompt=self.PROMPT)
        routing = complete(server, "sparse_fn", self.PROMPT, moa={"return_routing": True})["choices"][0]["moa"]["routing"]
        page.locator(".token").nth(3).hover()
        page.locator("#inspector").wait_for()
        token = routing["tokens"][3]
        cells = page.evaluate(
            """() => [...document.querySelectorAll("#inspector-map td[data-at]")].map((cell) => [
                cell.parentElement.cells[0].textContent, cell.cellIndex - 1, Number(cell.dataset.value),
                !cell.classList.contains("off")])"""
        )
        assert sorted(map(tuple, cells)) == sorted(
            (name, layer, token["weights"][layer][column], bool(token["selected"][layer][column]))
            for layer, names in enumerate(routing["experts"])
            for column, name in enumerate(names)
        )
        assert {kept for *_, kept in cells} == {True, False}
        page.keyboard.press("Escape")
        page.locator(".token").first.focus()
        page.keyboard.press("ArrowRight")
        assert "token 2 of 12" in page.locator("#inspector-about").inner_text()

    def test_one_adapter_answers_under_two_ways_of_routing(self, seen: Visit, server: Running) -> None:
        page = seen.page
        page.goto(f"{server.url}/dashboard#playground")
        moa = {"mode": "soft", "disable": ["Q"]}
        ask(seen, "sparse_fn", "sparse_fn", prompt=self.PROMPT, options_0=json.dumps(moa))
        for place, options in enumerate((moa, {})):
            answer = complete(server, "sparse_fn", self.PROMPT, moa={"return_routing": True, **options})
            pane = page.locator(".pane").nth(place)
            assert pane.locator(".answer").evaluate("(node) => node.textContent") == answer["choices"][0]["text"]
            page.locator("#colour-expert").select_option("expert Q")
            is_off = pane.locator(".token").evaluate_all("(all) => all.map((one) => one.classList.contains('off'))")
            assert (False in is_off) == (place == 1)
        ask(seen, "sparse_fn", "sparse_fn", prompt=self.PROMPT, options_0="soft", options_1='{"mode": "soft"}')
        assert "must be a JSON object" in page.locator(".pane .problem").first.inner_text()
        assert page.locator(".pane .problem").nth(1).is_hidden()

    def test_the_base_streams_beside_an_adapter_without_a_router(self, seen: Visit, server: Running) -> None:
        page = seen.page
        page.goto(f"{server.url}/dashboard#playground")
        ask(seen, "base", "lora", prompt="plain")
        for place, model in enumerate(("base", "lora")):
            text = complete(server, model, "plain")["choices"][0]["text"]
            assert page.locator(".answer").nth(place).evaluate("(node) => node.textContent") == text
        assert not page.locator(".token").count()

    def test_chat_and_instruction_are_sent_as_they_say(self, seen: Visit, server: Running) -> None:
        page = seen.page
        bodies: list[Any] = []
        page.on("request", lambda request: bodies.append((request.url, request.post_data_json)) if request.method == "POST" else None)
        page.goto(f"{server.url}/dashboard#playground")
        for mode in ("Chat", "Instruction"):
            page.get_by_label(mode).check()
            page.locator("#seed").fill("7")
            page.locator("#max-tokens").fill("4")
            page.locator("#run").click()
            page.locator(".pane-state").nth(1).get_by_text("ended").wait_for()
            page.locator(".pane-state").nth(0).get_by_text("ended").wait_for()
        chats, instructions = bodies[:2], bodies[2:]
        assert all(
            url.endswith("/v1/chat/completions") and body["messages"][0]["role"] == "user" and body["seed"] == 7 for url, body in chats
        )
        assert len(instructions) == 2
        typed = page.locator("#prompt").input_value()
        assert {body["prompt"] for _, body in instructions} == {prompt_text(Example("text", typed))}

    def test_stop_ends_the_requests(self, seen: Visit, server: Running) -> None:
        page = seen.page
        page.goto(f"{server.url}/dashboard#playground")
        page.get_by_label("Completion").check()
        page.locator("#prompt").fill("for ever")
        page.locator("#max-tokens").fill("450")
        page.route(
            "**/v1/completions", lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))
        )
        for place, model in enumerate(("soft", "base")):
            page.locator(f"#model-{place}").select_option(model)
        page.locator("#run").click()
        page.locator(".token").nth(2).wait_for()
        page.locator("#stop").click()
        page.locator(".pane-state").nth(0).get_by_text("ended stopped here").wait_for()
        assert page.locator("#stop").is_disabled()
        deadline = 50
        while deadline and "moa_streams_open 0" not in httpx.get(f"{server.url}/metrics", headers=HEADERS).text:
            page.wait_for_timeout(100)
            deadline -= 1
        assert deadline, "the server still computes what nobody waits for"

    def test_errors_are_in_the_servers_words(self, browser: Any, server: Running) -> None:
        with visit(browser, server.url) as found:
            enter(found, "playground")
            ask(found, "soft", "base", prompt="x", max_tokens="90000")
            body = {"model": "soft", "prompt": "x", "max_tokens": 90000}
            message = httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS).json()["error"]["message"]
            assert found.page.locator(".pane .problem").first.inner_text() == message
            found.check("status of 400")


def test_what_is_hostile_is_shown_as_it_is(browser: Any, server: Running) -> None:
    """Names, errors, events and answers come from others; an answer can be made to be anything."""
    with visit(browser, server.url) as found:
        page = found.page

        def adapters(route: Any) -> None:
            shown = get(server, "v1/adapters")
            shown["data"].append({**shown["data"][0], "id": HOSTILE, "error": HOSTILE, "variant": HOSTILE, "state": "loaded"})
            route.fulfill(json=shown)

        def answer(route: Any) -> None:
            routing = {
                "experts": [[HOSTILE]],
                "tokens": [{"id": 1, "token": HOSTILE, "weights": [[0.5]], "selected": [[1]], "threshold": None}],
            }
            events = [{"choices": [{"index": 0, "text": HOSTILE, "finish_reason": "stop", "moa": {"routing": routing}}]}, {"choices": []}]
            body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            route.fulfill(body=body, content_type="text/event-stream")

        page.route("**/v1/adapters", adapters)
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": HOSTILE}, {"id": "base"}]}))
        page.route("**/v1/completions", answer)
        page.route("**/v1/adapters/*/experts", lambda route: route.fulfill(status=400, json={"error": {"message": HOSTILE}}))
        enter(found)
        assert page.locator("#adapters a").get_by_text(HOSTILE, exact=True).count() == 1
        page.locator("#adapters .problem").get_by_text(HOSTILE, exact=True).wait_for()
        page.locator("#adapters a").get_by_text(HOSTILE, exact=True).click()
        page.locator("#experts-error").get_by_text(HOSTILE, exact=True).wait_for()
        page.goto(f"{server.url}/dashboard#playground")
        ask(found, HOSTILE, "base", prompt=HOSTILE)
        assert page.locator(".answer").first.evaluate("(node) => node.textContent") == HOSTILE
        page.locator(".token").first.hover()
        assert page.locator("#inspector-map tbody th").inner_text() == HOSTILE
        assert "broken" not in page.title()
        assert not page.locator("main img, main script").count()
        found.check("status of 400")


class TestEverybody:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1280, 360])
    def test_nothing_is_in_the_way_of_anybody(self, browser: Any, server: Running, scheme: str, width: int) -> None:
        """axe-core looks at every view, with tokens and a heat map; and nothing is wider than the screen."""
        axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed: pip install -e '.[test]'")
        source = (Path(axe.__file__).parent / "axe.min.js").read_text()
        with visit(browser, server.url, width=width, height=800, color_scheme=scheme, reduced_motion="reduce") as found:
            page = found.page
            enter(found)
            for view in ("live", "experts/sparse_fn", "playground"):
                page.goto(f"{server.url}/dashboard#{view}")
                if view == "playground":
                    ask(found, "sparse_fn", "base", prompt="seen by all")
                    page.locator(".token").nth(1).focus()
                elif view != "live":
                    page.locator("#experts-map td[data-at]").first.wait_for()
                page.evaluate(source)
                broken = page.evaluate(
                    "axe.run().then(({ violations }) => violations.map((one) => [one.id, one.nodes.map((node) => node.html)]))"
                )
                assert broken == [], view
                assert page.evaluate("document.documentElement.scrollWidth") <= width, view
            assert page.evaluate("document.getAnimations().length") == 0
            found.check()

    def test_the_theme_follows_the_system_until_one_is_chosen(self, browser: Any, server: Running) -> None:
        with visit(browser, server.url, color_scheme="dark") as found:
            page = found.page
            enter(found)

            def paper() -> str:
                return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

            dark = paper()
            page.emulate_media(color_scheme="light")
            light = paper()
            assert light != dark
            page.get_by_role("button", name="Use the dark theme").click()
            assert paper() == dark
            page.reload()
            assert paper() == dark
            found.check()

    def test_the_keyboard_alone_is_enough(self, seen: Visit, server: Running) -> None:
        """From the address bar to a token's experts; the focus is always to be seen."""
        page = seen.page
        reached: list[str] = []
        for _ in range(40):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(
                "(() => { const at = document.activeElement, look = at.matches('.choice input') ? at.nextElementSibling : at;"
                " return [at.id || at.textContent.trim(), getComputedStyle(look).outlineStyle]; })()"
            )
            assert outline != "none", name
            reached.append(name)
            if name == "Playground":
                page.keyboard.press("Enter")
                page.locator("#view-playground").wait_for()
            if name == "prompt":
                page.keyboard.press("Control+A")
                page.keyboard.type("typed")
                page.keyboard.press("Control+Enter")
                page.locator(".pane-state").nth(0).get_by_text("ended").wait_for()
                page.locator(".pane-state").nth(1).get_by_text("ended").wait_for()
            if page.evaluate("document.activeElement.matches('.token')"):
                break
        assert reached[:2] == ["Skip to the content", "Live"]
        assert {"theme", "key", "prompt", "model-0", "model-1", "max-tokens", "temperature", "seed", "run", "colour-expert"} <= set(reached)
        assert page.locator("#inspector").is_visible()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert "held" in page.locator("#inspector-about").inner_text()
        page.keyboard.press("Escape")
        assert page.locator("#inspector").is_hidden()
