"""Test the signature with the specification's own example."""

from datetime import UTC, datetime

from service.webhooks.message import Signer

# From the documents of the Standard Webhooks project.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'
AT = datetime.fromtimestamp(1614265330, UTC)
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_signature_is_the_standard_one() -> None:
    headers = Signer([SECRET]).headers("p5jXN8AQM9LWM0D4loKWxJek", BODY, AT)
    assert headers["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert headers["webhook-timestamp"] == "1614265330"
    assert headers["webhook-signature"] == SIGNATURE


def test_every_secret_signs() -> None:
    other = "whsec_" + "b3RoZXIg" * 4
    headers = Signer([other, SECRET]).headers("p5jXN8AQM9LWM0D4loKWxJek", BODY, AT)
    first, second = headers["webhook-signature"].split(" ")
    assert second == SIGNATURE
    assert first.startswith("v1,")
    assert first != second
