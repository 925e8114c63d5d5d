"""The one answer of Kubernetes' API server that Ray's head asks for, over HTTPS on the loopback."""

import datetime
import ipaddress
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "127.0.0.1"
NAMESPACE = "default"


class ApiServer:
    """Holds one RayCluster, as KubeRay makes it of a RayJob.

    Args:
        folder: for its certificate.
        cluster: content of the RayJob's `rayClusterSpec`.
    """

    def __init__(self, folder: Path, name: str, cluster: dict[str, Any]) -> None:
        certificate, key = _certificate(folder)
        metadata = {"name": name, "namespace": NAMESPACE}
        answer = json.dumps({"kind": "RayCluster", "metadata": metadata, "spec": cluster}).encode()
        path = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayclusters/{name}"

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == path else 403)
                self.end_headers()
                if self.path == path:
                    self.wfile.write(answer)

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.env = {
            # Of KubeRay and of Kubernetes.
            "RAY_CLUSTER_NAME": name,
            "RAY_CLUSTER_NAMESPACE": NAMESPACE,
            "KUBERNETES_SERVICE_HOST": HOST,
            "KUBERNETES_SERVICE_PORT_HTTPS": str(self._server.server_port),
            # In the place of the token and the certificate that a Pod finds among its files.
            "RAY_KUBERAY_CA_CERT_PATH": str(certificate),
            "RAY_KUBERAY_CLIENT_CERT_PATH": str(certificate),
            "RAY_KUBERAY_CLIENT_KEY_PATH": str(key),
            "NO_PROXY": HOST,
        }

    def __enter__(self) -> "ApiServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of this address that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address(HOST))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "kubernetes.crt").write_bytes(certificate.public_bytes(pem))
    (folder / "kubernetes.key").write_bytes(key.private_bytes(pem, *plain))
    return folder / "kubernetes.crt", folder / "kubernetes.key"
