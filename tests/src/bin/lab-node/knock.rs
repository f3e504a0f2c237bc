//! Callers that do not belong at a port: garbage, half a greeting, silence, no certificate or one of
//! somebody else's. Says what each of them got for it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tests::lab::knock::{Caller, Knock};

/// What a client of HTTP/2 says first (RFC 9113, 3.4), and empty settings: a server that lets it in
/// answers with its own.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

#[derive(Args)]
pub(crate) struct Options {
    /// The port, host:port
    address: SocketAddr,
    /// Who calls, one after the other
    #[arg(long = "as", value_enum, required = true)]
    callers: Vec<Caller>,
    /// For `certificate`: the certificate, PEM
    #[arg(long)]
    certificate: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long)]
    key: Option<PathBuf>,
    /// How long to wait to be answered or turned away, seconds
    #[arg(long, default_value_t = 15)]
    patience: u64,
}

/// Calls; prints what came of it (JSON).
pub(crate) fn knock(options: &Options) -> anyhow::Result<()> {
    let knocks: Result<Vec<_>, _> =
        options.callers.iter().map(|caller| call(options, *caller)).collect();
    println!("{}", serde_json::to_string(&knocks?)?);
    Ok(())
}

fn call(options: &Options, caller: Caller) -> anyhow::Result<Knock> {
    let patience = Duration::from_secs(options.patience);
    let mut socket = TcpStream::connect_timeout(&options.address, patience)
        .with_context(|| format!("{} takes no connections", options.address))?;
    socket.set_read_timeout(Some(patience))?;
    socket.set_write_timeout(Some(patience))?;
    let begun = Instant::now();
    let answer = match caller {
        Caller::Garbage => say(&mut socket, &garbage()?),
        // The beginning of a TLS record that announces 512 bytes, and nothing after it.
        Caller::HalfHello => {
            say(&mut socket, &[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]).and_then(|none| {
                socket.shutdown(std::net::Shutdown::Write)?;
                Ok(none)
            })
        }
        Caller::Silence => Ok(()),
        Caller::NoCertificate | Caller::StrangeCertificate | Caller::Certificate => {
            return talk_tls(options, caller, socket, begun);
        }
    };
    Ok(outcome(caller, begun, answer.and_then(|()| read_once(&mut socket))))
}

fn talk_tls(
    options: &Options,
    caller: Caller,
    mut socket: TcpStream,
    begun: Instant,
) -> anyhow::Result<Knock> {
    let name = ServerName::try_from("knock.invalid")?;
    let mut connection = ClientConnection::new(Arc::new(config(options, caller)?), name)?;
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    let answer = say(&mut stream, PREFACE).and_then(|()| read_once(&mut stream));
    Ok(outcome(caller, begun, answer))
}

fn say(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

fn read_once(from: &mut impl Read) -> io::Result<usize> {
    from.read(&mut [0; 4096])
}

/// A read that times out was neither answered nor turned away.
fn outcome(caller: Caller, begun: Instant, answer: io::Result<usize>) -> Knock {
    let (answered, end) = match answer {
        Ok(0) => (0, "closed".to_owned()),
        Ok(count) => (count, "answered".to_owned()),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
        {
            (0, "left waiting".to_owned())
        }
        Err(error) => (0, error.to_string()),
    };
    let after_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Knock { caller, answered, end, after_ms }
}

/// Bytes that are no TLS: their first is no record's type.
fn garbage() -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 64 << 10];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    bytes[0] = 0xff;
    Ok(bytes)
}

fn config(options: &Options, caller: Caller) -> anyhow::Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let anyone = Arc::new(Anyone(Arc::clone(&provider)));
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(anyone);
    let mut config = match caller {
        Caller::StrangeCertificate => {
            let key = rcgen::KeyPair::generate()?;
            let certificate = rcgen::CertificateParams::new(vec!["holdfast".to_owned()])?;
            let certificate = certificate.self_signed(&key)?.der().clone();
            let key = PrivatePkcs8KeyDer::from(key.serialize_der());
            builder.with_client_auth_cert(vec![certificate], key.into())?
        }
        Caller::Certificate => {
            let certificate = options.certificate.as_ref().context("--certificate is missing")?;
            let key = options.key.as_ref().context("--key is missing")?;
            let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate)?.collect();
            builder.with_client_auth_cert(chain?, PrivateKeyDer::from_pem_file(key)?)?
        }
        Caller::Garbage | Caller::HalfHello | Caller::Silence | Caller::NoCertificate => {
            builder.with_no_client_auth()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Takes any server for the right one: the question is whether the server takes us.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
