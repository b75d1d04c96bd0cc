"""The server's contract with clouds, gateways and browsers: routes, headers, status codes. Without sockets."""

import gzip
import json
import re
import zlib

import httpx
import pytest

from pipelines.errors import SettingsError
from pipelines.serving.job import ServeJob
from pipelines.serving.settings import ServeSettings
from tests.serving.conftest import ApiClient
from tests.serving.keys import KEYS

TEXTS = ["Noon at the usual place?", "WIN a free cruise now!!! " * 300]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def scores(api):
    """The scores of TEXTS, as sorted lists of labels."""
    return api.post("/predict", json={"inputs": [[text] for text in TEXTS]}).json()


@pytest.fixture(scope="module")
def multilabel(folders):
    client = ApiClient(ServeJob.parse({"model": str(folders["multilabel"].path), "dtype": "float32", "device": "cpu"}))
    client.headers = {}
    yield client
    client.close()


@pytest.mark.parametrize("path", ["/", "/invocations", "/predict"])
def test_routes_that_are_predict(api, scores, path):
    assert api.post(path, json={"inputs": TEXTS[1]}).json() == scores[1]
    assert api.post(path, json={"inputs": [[text] for text in TEXTS]}).json() == scores
    assert api.post(path, json={"inputs": TEXTS, "parameters": {"top_k": 1}}).json() == [row[:1] for row in scores]


@pytest.mark.parametrize("path", ["/vertex", "/v1/models/spam:predict"])
def test_instances(api, scores, path):
    for instances in (TEXTS, [{"text": text} for text in TEXTS], [{"inputs": text} for text in TEXTS]):
        assert api.post(path, json={"instances": instances}).json() == {"predictions": scores}
    answer = api.post(path, json={"instances": TEXTS, "parameters": {"top_k": 1}}).json()
    assert answer == {"predictions": [row[:1] for row in scores]}
    for body in ({"instances": []}, {"instances": [3]}, {"inputs": ["a"]}, {"instances": [{"txt": "a"}]}):
        assert api.post(path, json=body).status_code == 422


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/models/other:predict"), ("POST", "/models/other"), ("GET", "/v2/models/other"),
     ("GET", "/v2/models/other/versions/1"), ("GET", "/v2/models/spam/versions/2"),
     ("GET", "/v2/models/spam/versions/2/ready"),
     ("POST", "/v2/models/spam/versions/2/infer"), ("GET", "/nowhere"), ("POST", "/nowhere")],
)  # fmt: skip
def test_what_is_not_here_is_404(api, method, path):
    body = {"instances": ["a"], "inputs": "a"}
    answer = api.request(method, path, **({"json": body} if method == "POST" else {}))
    assert answer.status_code == 404
    assert answer.json()["error_type"] == "route"


def test_models_and_versions(api):
    (listed,) = api.get("/v1/models").json()["data"]
    assert listed["id"] == "spam"
    assert api.get("/v1/models/spam").json() == {"name": "spam", "ready": True, **listed}
    assert api.get("/v1/models/other").status_code == 404
    assert api.get("/v2/models/spam/versions/1").json() == api.get("/v2/models/spam").json()
    assert api.get("/v2/models/spam/versions/1/ready").status_code == 200
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    answers = [api.post(f"/v2/models/spam{part}/infer", json={"inputs": [tensor]}) for part in ("", "/versions/1")]
    assert answers[0].json() == answers[1].json()


READ = ["/", "/docs", "/health", "/livez", "/readyz", "/ping", "/info", "/metrics", "/v1/models", "/v1/models/spam",
        "/v2", "/v2/health/ready", "/v2/models/spam", "/openapi.json"]  # fmt: skip


@pytest.mark.parametrize("path", READ)
def test_head_is_get_without_a_body(api, path):
    got, head = api.get(path), api.request("HEAD", path)
    assert (got.status_code, head.status_code, head.content) == (200, 200, b"")
    if path not in ("/metrics", "/info"):
        assert head.headers["content-length"] == got.headers["content-length"]
    assert head.headers["content-type"] == got.headers["content-type"]


def test_head_of_other_routes(api):
    assert api.request("HEAD", "/predict").status_code == 405
    assert api.request("HEAD", "/nowhere").status_code == 404
    assert api.request("HEAD", "/info", headers={}).status_code == 401


@pytest.mark.parametrize("path", ["/", "/predict", "/invocations", "/vertex"])
def test_predictions_need_a_key(api, path):
    answer = api.post(path, json={"inputs": "a"}, headers=JSON)
    assert answer.status_code == 401
    assert answer.json()["error_type"] == "unauthorized"


OTHER_KINDS = [None, "text/plain", "application/x-www-form-urlencoded", "text/csv", "multipart/form-data; boundary=x",
               "application/jsonlines"]  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_content_than_json_is_415(api, kind):
    headers = {**api.headers, **({} if kind is None else {"content-type": kind})}
    answer = api.post("/predict", content=b'{"inputs": "a"}', headers=headers)
    assert answer.status_code == 415
    assert "send content-type: application/json" in answer.json()["error"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.kserve+json"])
def test_json_by_its_names(api, kind):
    headers = {**api.headers, "content-type": kind}
    assert api.post("/predict", content=b'{"inputs": "a"}', headers=headers).status_code == 200


def test_compressed_bodies(api, scores):
    def send(content, encoding="gzip"):
        return api.post("/predict", content=content, headers={**api.headers, **JSON, "content-encoding": encoding})

    body = json.dumps({"inputs": TEXTS[1]}).encode()
    assert send(gzip.compress(body)).json() == scores[1]
    assert send(gzip.compress(body[:50]) + gzip.compress(body[50:])).json() == scores[1]
    assert send(gzip.compress(body), "x-gzip").json() == scores[1]
    assert send(body, "identity").json() == scores[1]
    raw = zlib.compressobj(wbits=-15)
    for content in (zlib.compress(body), raw.compress(body) + raw.flush()):
        assert send(content, "deflate").json() == scores[1]
    assert send(zlib.compress(b" " * 50_000_000), "deflate").status_code == 413
    for content in (b"", b"no gzip", gzip.compress(body)[:-9], gzip.compress(body) + b"more"):
        assert send(content).status_code == 422
    bomb = send(gzip.compress(b" " * 50_000_000))
    assert (bomb.status_code, bomb.json()["error_type"]) == (413, "too_large")
    for encoding in ("br", "gzip, gzip", "zstd"):
        assert send(body, encoding).status_code == 415


def test_long_answers_are_compressed_for_those_who_accept_it(api):
    body = {"inputs": ["a"] * 40}
    zipped = api.post("/v1/predict", json=body, headers={**api.headers, "accept-encoding": "gzip"})
    plain = api.post("/v1/predict", json=body, headers={**api.headers, "accept-encoding": "identity"})
    assert zipped.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert zipped.json() == plain.json()
    short = api.post("/predict", json={"inputs": "a"}, headers={**api.headers, "accept-encoding": "gzip"})
    assert "content-encoding" not in short.headers


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "soon", "", "1e999"])
def test_timeouts_that_are_no_positive_numbers_are_422(api, value):
    answer = api.post("/predict", json={"inputs": "a"}, headers={**api.headers, "x-request-timeout-seconds": value})
    assert answer.status_code == 422
    assert "x-request-timeout-seconds must be a positive number" in answer.json()["error"]


def test_timeout_of_the_client_is_kept(api):
    def ask(seconds):
        headers = {**api.headers, "x-request-timeout-seconds": seconds}
        return api.post("/v1/predict", json={"inputs": ["word " * 1500] * 20}, headers=headers)

    assert ask("60").status_code == 200
    answer = ask("0.001")
    assert answer.status_code == 408, "as Ray Serve's proxy answers it"
    assert "0.001 s (x-request-timeout-seconds)" in answer.json()["error"]


def test_requests_that_cannot_be_in_time_are_refused_before_work(multilabel, monkeypatch):
    monkeypatch.setattr(multilabel.predictor._batcher._rate, "tokens_per_second", 1000.0)
    headers = {"x-request-timeout-seconds": "20"}
    answer = multilabel.post("/v1/predict", json={"inputs": ["word " * 5_000] * 10}, headers=headers)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert re.search(r"50,000 tokens take about [\d.]+ s on this server \([\d,]+ tokens per second\)", error), error
    assert "the limit is x-request-timeout-seconds=20; send fewer or shorter texts" in error


@pytest.mark.parametrize("shape", [[2], [1, 2], [0], [], [-1], ["1"], "1", [1.0], [True], [10**30]])
def test_shapes_that_do_not_fit_are_400(api, shape):
    tensor = {"name": "text", "shape": shape, "datatype": "BYTES", "data": ["a"]}
    answer = api.post("/v2/models/spam/infer", json={"inputs": [tensor]})
    assert answer.status_code == 400
    assert "`shape` does not fit its 1 strings" in answer.json()["error"]


@pytest.mark.parametrize("shape", [[1], [1, 1]])
def test_shapes_that_fit(api, shape):
    tensor = {"name": "text", "shape": shape, "datatype": "BYTES", "data": ["a"]}
    assert api.post("/v2/models/spam/infer", json={"inputs": [tensor]}).status_code == 200


def test_options_are_honoured_or_refused(api, multilabel):
    def status(client, path, **body):
        return client.post(path, json=body).status_code

    for client, own, other in ((api, "softmax", "sigmoid"), (multilabel, "sigmoid", "softmax")):
        assert status(client, "/predict", inputs=["a"], parameters={"function_to_apply": own}) == 200
        for wrong in (other, "none", 3):
            assert status(client, "/predict", inputs=["a"], parameters={"function_to_apply": wrong}) == 422
        assert status(client, "/vertex", instances=["a"], parameters={"function_to_apply": other}) == 422
    assert status(api, "/predict", inputs="a", raw_scores=True) == 422
    assert status(api, "/predict", inputs="a", raw_scores=False, truncate=True) == 200
    for name in ("activation", "use_activation"):
        assert status(api, "/classify", input="a", **{name: False}) == 422
        assert status(api, "/classify", input="a", **{name: True}) == 200


def test_pages_of_other_origins(folders):
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST",
                 "access-control-request-private-network": "true",
                 "access-control-request-headers": "authorization,x-stainless-os,x-request-id"}  # fmt: skip
    values = {"model": str(folders["binary"].path), "dtype": "float32", "device": "cpu", "api_keys": []}
    for origins, allowed in (
        ((), None),
        (("https://app.example",), "https://app.example"),
        (("https://b.example",), None),
    ):
        client = ApiClient(ServeJob.parse({**values, "cors_allow_origins": list(origins)}))
        try:
            answer = client.request("OPTIONS", "/v1/predict", headers=preflight)
            assert answer.headers.get("access-control-allow-origin") == allowed
            if allowed:
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-methods"] == "GET, HEAD, POST"
            elif not origins:
                assert answer.status_code == 405
            else:
                assert (answer.status_code, answer.json()["error_type"]) == (400, "origin")
            for body, status in (({"inputs": ["a"]}, 200), ({"inputs": 3}, 422)):
                answer = client.post("/v1/predict", json=body, headers={"origin": "https://app.example"})
                assert answer.status_code == status
                assert answer.headers.get("access-control-allow-origin") == allowed, "errors can be read, too"
        finally:
            client.close()


def test_preflight_needs_no_key(spam_folder):
    from tests.serving.keys import HASHES

    values = {"model": str(spam_folder.path), "dtype": "float32", "api_keys": HASHES, "cors_allow_origins": ["*"]}
    client = ApiClient(ServeJob.parse(values))
    try:
        headers = {"origin": "https://x.example", "access-control-request-method": "POST"}
        assert client.request("OPTIONS", "/v1/predict", headers=headers).status_code == 200
        refused = client.post("/v1/predict", json={"inputs": ["a"]}, headers={"origin": "https://x.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "*"
        known = {"authorization": f"Bearer {KEYS[0]}", "origin": "https://x.example"}
        assert client.post("/v1/predict", json={"inputs": ["a"]}, headers=known).status_code == 200
    finally:
        client.close()


def test_every_refusal_has_the_error_schema(api):
    answers: list[httpx.Response] = [
        api.get("/nowhere"),
        api.get("/predict"),
        api.request("DELETE", "/predict"),
        api.request("PUT", "/v1/predict", json={}),
        api.post("/health", json={}),
        api.post("/predict", json={"inputs": "a"}, headers=JSON),
        api.post("/predict", content=b"{", headers={**api.headers, **JSON}),
        api.post("/predict", content=b"x", headers=api.headers),
        api.post("/predict", json={"inputs": "a" * 5_000_000}),
        api.get("/v2/models/other"),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 405, 405, 405, 401, 422, 415, 413, 404]
    for answer in answers:
        assert set(answer.json()) == {"error", "error_type"}


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://app.example/page", "null", "", "https://a b"]
)
def test_origins_that_can_never_match_are_refused(origin):
    with pytest.raises(SettingsError, match="is no origin"):
        ServeSettings(cors_allow_origins=("https://app.example", origin))


OPTIONS = [{"raw_scores": True}, {"activation": False}, {"use_activation": False}, {"softmax": False},
           {"function_to_apply": "none"}, {"function_to_apply": "sigmoid"}, {"top_k": 0}, {"top_k": "2"},
           {"candidate_labels": ["x", "y"]}]  # fmt: skip
BODIES = [("/predict", {"inputs": "a"}), ("/", {"inputs": "a"}), ("/models/spam", {"inputs": "a"}),
          ("/classify", {"input": "a"}), ("/v1/moderations", {"input": "a"}), ("/vertex", {"instances": ["a"]}),
          ("/v1/models/spam:predict", {"instances": ["a"]}),
          ("/v2/models/spam/infer", {"inputs": [{"name": "text", "datatype": "BYTES", "data": ["a"]}]})]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_change_scores_are_never_ignored(api, path, body, options):
    places = [{**body, "parameters": options}]
    if path.startswith("/v2"):
        (tensor,) = body["inputs"]
        places.append({"inputs": [{**tensor, "parameters": options}]})
        places.append({**body, "outputs": [{"name": "scores", "parameters": options}]})
    else:
        places += [{**body, **options}, {**body, "options": options}]
    if "instances" in body:
        places.append({"instances": [{"inputs": "a", **options}]})
    assert api.post(path, json=body).status_code == 200
    for content in places:
        answer = api.post(path, json=content)
        assert answer.status_code == 422, content
        assert next(iter(options)) in answer.json()["error"]


def test_number_of_labels_wherever_it_stands(api, scores):
    for body in ({"top_k": 1}, {"parameters": {"top_k": 1}}, {"parameters": {"return_all_scores": False}}):
        assert api.post("/predict", json={"inputs": [[text] for text in TEXTS], **body}).json() == [
            row[:1] for row in scores
        ]
    answer = api.post("/vertex", json={"instances": [{"inputs": TEXTS[1], "top_k": 1}]})
    assert answer.json() == {"predictions": [scores[1][:1]]}


def test_pairs_of_every_client(folders):
    client = ApiClient(ServeJob.parse({"model": str(folders["multiclass"].path), "dtype": "float32", "device": "cpu"}))
    try:
        pair = {"text": "a", "text_pair": "b"}
        (expected,) = client.post("/predict", json={"inputs": [["a", "b"]]}).json()
        assert client.post("/predict", json={"inputs": pair}).json() == expected
        assert client.post("/predict", json={"inputs": [pair, pair]}).json() == [expected] * 2
        for instance in (pair, {"inputs": pair}, {"inputs": [["a", "b"]]}):
            assert client.post("/vertex", json={"instances": [instance]}).json() == {"predictions": [expected]}
        answer = client.post("/vertex", json={"instances": [{"inputs": [["a"], ["b"]]}]})
        assert (answer.status_code, "2 inputs" in answer.json()["error"]) == (422, True)
    finally:
        client.close()


def test_outputs_that_are_asked_for(api):
    tensor = {"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [["a"], ["b"]]}

    def infer(*outputs):
        return api.post("/v2/models/spam/infer", json={"inputs": [tensor], "outputs": list(outputs)})

    assert [output["name"] for output in infer({"name": "label"}).json()["outputs"]] == ["label"]
    assert len(infer().json()["outputs"]) == 4
    for outputs in ({"name": "nope"}, {"name": "scores", "parameters": {"classification": 1}}, {}, "scores"):
        assert infer(outputs).status_code == 400


@pytest.mark.parametrize("thresholds", [True, "0.9", [True], ["0.1"], {"spam": True}, {"spam": "1"}])
def test_thresholds_are_numbers(api, thresholds):
    answer = api.predict(inputs=["a"], thresholds=thresholds)
    assert answer.status_code == 422
    assert "body.thresholds: must be a number from 0 to 1" in answer.json()["error"]


def test_flags_are_booleans_and_no_thresholds_are_none(api):
    for windows in ("off", 1, "true"):
        assert api.predict(inputs=["a"], windows=windows).status_code == 422
    assert api.predict(inputs=["a"], thresholds={}).json() == api.predict(inputs=["a"]).json()


def test_names_with_a_slash(spam_folder):
    values = {"model": str(spam_folder.path), "dtype": "float32", "device": "cpu", "name": "org/model"}
    client = ApiClient(ServeJob.parse(values))
    try:
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
        for path in ("/v1/models/org/model", "/v1/models/org%2Fmodel", "/v2/models/org/model",
                     "/v2/models/org/model/ready", "/v2/models/org/model/versions/1",
                     "/v2/models/org/model/versions/1/ready"):  # fmt: skip
            assert client.get(path).status_code == 200, path
        assert client.get("/v2/models/org/model/ready").json()["name"] == "org/model"
        assert client.post("/v1/models/org/model:predict", json={"instances": ["a"]}).status_code == 200
        for part in ("", "/versions/1"):
            answer = client.post(f"/v2/models/org/model{part}/infer", json={"inputs": [tensor]})
            assert answer.json()["model_name"] == "org/model"
        assert client.get("/v1/models/org").status_code == 404
    finally:
        client.close()


@pytest.mark.parametrize("name", ["", " ", "/a", "a/"])
def test_names_that_no_path_can_have(name):
    with pytest.raises(SettingsError, match="name"):
        ServeSettings(name=name)


def test_paths(api, scores):
    assert api.post("/predict/", json={"inputs": TEXTS[1]}).json() == scores[1]
    assert api.request("GET", "/ping/", headers={}).status_code == 200
    assert api.request("PUT", "/", json={}).headers["allow"] == "GET, HEAD, POST"
    assert api.post("/nowhere", content=b"x").status_code == 404, "not what is said of a body without a type"
    assert api.post("/vertex?name=other", json={"instances": ["a"]}).status_code == 200


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [("gzip", "gzip"), ("GZIP;q=0.5, br", "gzip"), ("gzip;q=0", None), ("gzip; q=0.0", None), ("notgzip", None),
     ("br, deflate", None), ("*;q=0, gzip", "gzip")],
)  # fmt: skip
def test_answers_are_compressed_for_those_who_accept_it(api, accepted, encoding):
    answer = api.get("/openapi.json", headers={**api.headers, "accept-encoding": accepted})
    assert answer.headers.get("content-encoding") == encoding
    assert answer.json()["info"]["title"] == "pipelines"


@pytest.mark.parametrize("value", ["1_0", "0x10", "1e999", "\u0661"])
def test_times_are_plain_numbers(api, value):
    headers = {**api.headers, "x-request-timeout-seconds": value.encode()}
    assert api.post("/predict", json={"inputs": "a"}, headers=headers).status_code == 422


def test_schema_has_keys_and_tensors(api):
    schema = api.get("/openapi.json").json()
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "key"}
    assert "requestBody" in schema["paths"]["/v2/models/{name}/infer"]["post"]
    assert list(schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    for path, methods in schema["paths"].items():
        for route in methods.values():
            assert all(one["in"] == "path" for one in route.get("parameters", [])), path


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [("/predict", {"instances": ["a"]}, "goes to /vertex"), ("/vertex", {"inputs": "a"}, "goes to /predict"),
     ("/predict", {"inputs": 3}, 'must be a text, a pair {"text": "...", "text_pair": "..."}, or a list'),
     ("/vertex", {"instances": ["a", {"text": "a", "id": 7}]}, "body.instances.1: must be a list of texts, of pairs"),
     ("/classify", {"input": {"a": 1}}, "must be a text or a list of texts")],
)  # fmt: skip
def test_refused_bodies_say_what_is_right(api, path, body, words):
    answer = api.post(path, json=body)
    assert answer.status_code == 422
    assert words in answer.json()["error"]
    assert ";" not in answer.json()["error"].replace("; the body takes", "").replace("; a body like", ""), "one problem"
