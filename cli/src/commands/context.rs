//! `clusterctl context`: which cluster to talk to, and as whom.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use proto::v1;
use proto::v1::membership_client::MembershipClient;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;

use crate::args::Global;
use crate::connect::{Session, Target, holder};
use crate::contexts::{self, Context, Contexts, write_private};
use crate::failure::{Exit, Failure};
use crate::output::{self, yes};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a context from files that are there
    #[command(
        after_help = "Examples:\n  clusterctl context add lab --address 192.0.2.1:7400 --address 192.0.2.2:7400 --ca ca.pem --certificate me.pem --key me.key --use"
    )]
    Add {
        /// Its name
        name: String,
        /// host:port of a node's API; more than once: tried in order
        #[arg(long = "address", required = true)]
        addresses: Vec<String>,
        /// The cluster's CA certificate, PEM
        #[arg(long)]
        ca: PathBuf,
        /// Your certificate, PEM
        #[arg(long)]
        certificate: PathBuf,
        /// Your key, PEM
        #[arg(long)]
        key: PathBuf,
        /// Replace a context of this name
        #[arg(long)]
        force: bool,
        /// Use it from now on
        #[arg(long = "use")]
        use_it: bool,
    },
    /// Make a key, have the cluster sign a certificate for it, and make a context of both. On a
    /// node, as root
    #[command(
        after_help = "Examples:\n  clusterctl context create-admin lab\n  clusterctl context create-admin lab --client-name ann --use"
    )]
    CreateAdmin {
        /// The context's name
        name: String,
        /// The client's name in the certificate; $USER where absent
        #[arg(long)]
        client_name: Option<String>,
        /// Addresses to keep instead of those that the cluster names
        #[arg(long = "address")]
        addresses: Vec<String>,
        /// Replace a context of this name
        #[arg(long)]
        force: bool,
        /// Use it from now on
        #[arg(long = "use")]
        use_it: bool,
    },
    /// Get a new key and certificate for a context, and the CA that the cluster has now; without a
    /// name, for the one in use
    #[command(
        after_help = "Before its certificate ends, or after `clusterctl cluster ca rotate`. The old certificate stays\ngood until it ends, its CA is dropped, or it is revoked (`clusterctl cluster cert revoke SERIAL`).\n\nExamples:\n  clusterctl context renew\n  clusterctl context renew lab"
    )]
    Renew {
        /// Its name
        name: Option<String>,
    },
    /// All contexts
    #[command(visible_alias = "ls", after_help = "Examples:\n  clusterctl context list")]
    List,
    /// Use a context from now on; without a name, the local agent
    #[command(after_help = "Examples:\n  clusterctl context use lab\n  clusterctl context use")]
    Use {
        /// Its name
        name: Option<String>,
    },
    /// One context; without a name, the one in use
    #[command(after_help = "Examples:\n  clusterctl context show lab")]
    Show {
        /// Its name
        name: Option<String>,
    },
}

/// A context as it is shown. Never the key itself, only where it is.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    current: bool,
    #[serde(flatten)]
    context: Context,
}

pub(crate) async fn run(global: &Global, command: Command) -> Result<(), Failure> {
    let folder = contexts::folder()?;
    let mut known = Contexts::load(&folder)?;
    match command {
        Command::Add { name, addresses, ca, certificate, key, force, use_it } => {
            check_new(&known, &name, force)?;
            let absolute = |path: PathBuf| {
                std::fs::canonicalize(&path).map_err(|error| Failure::file("find", &path, &error))
            };
            let (ca, certificate, key) = (absolute(ca)?, absolute(certificate)?, absolute(key)?);
            known.contexts.insert(name.clone(), Context { addresses, ca, certificate, key });
            finish(global, &folder, known, name, use_it)
        }
        Command::CreateAdmin { name, client_name, addresses, force, use_it } => {
            check_new(&known, &name, force)?;
            let client = client_name.or_else(|| std::env::var("USER").ok());
            let client = client.filter(|client| !client.is_empty()).unwrap_or("admin".to_owned());
            let (key, issued) = issue(global, client.clone()).await?;
            let own = |file: &str| PathBuf::from(&name).join(file);
            let addresses = if addresses.is_empty() { issued.api_addresses } else { addresses };
            write_private(&folder.join(own("key.pem")), key.as_bytes())?;
            write_private(&folder.join(own("cert.pem")), issued.certificate_pem.as_bytes())?;
            write_private(&folder.join(own("ca.pem")), issued.ca_pem.as_bytes())?;
            let context = Context {
                addresses,
                ca: own("ca.pem"),
                certificate: own("cert.pem"),
                key: own("key.pem"),
            };
            known.contexts.insert(name.clone(), context);
            finish(global, &folder, known, name, use_it)?;
            if issued.role.is_empty() {
                eprintln!(
                    "`{client}` may do nothing yet: give it a role with `clusterctl config set access/{client} role=viewer` (or operator, admin)"
                );
            }
            Ok(())
        }
        Command::Renew { name } => {
            let Some(name) = name.or_else(|| known.current.clone()) else {
                return Err(Failure::new(Exit::NotFound, "no context is in use")
                    .why("commands go to the local agent, which needs no certificate")
                    .remedy("name one: see `clusterctl context list`"));
            };
            let known = renew(global, &folder, known, &name).await?;
            match show(&folder, &known, &name) {
                Some(shown) => print_one(global, &shown),
                None => Ok(()),
            }
        }
        Command::List => {
            let shown: Vec<_> =
                known.contexts.keys().filter_map(|name| show(&folder, &known, name)).collect();
            output::print(global.output, &shown, |shown| {
                let rows = shown.iter().map(|shown| {
                    let addresses = shown.context.addresses.join(", ");
                    [shown.name.clone(), yes(shown.current), addresses]
                });
                output::columns(["CONTEXT", "IN USE", "ADDRESSES"], rows)
            })
        }
        Command::Use { name } => {
            if let Some(name) = &name {
                known.get(name)?;
            }
            known.current.clone_from(&name);
            known.store(&folder)?;
            output::print(global.output, &name, |name| match name {
                Some(name) => format!("using context {name}"),
                None => "using the local agent".to_owned(),
            })
        }
        Command::Show { name } => {
            let Some(name) = name.or_else(|| known.current.clone()) else {
                return Err(Failure::new(Exit::NotFound, "no context is in use")
                    .why("commands go to the local agent")
                    .remedy("see `clusterctl context list`"));
            };
            known.get(&name)?;
            match show(&folder, &known, &name) {
                Some(shown) => print_one(global, &shown),
                None => Ok(()),
            }
        }
    }
}

/// A name becomes a folder's name too.
fn check_new(known: &Contexts, name: &str, force: bool) -> Result<(), Failure> {
    if let Err(error) = name.parse::<proto::Name>() {
        return Err(Failure::new(Exit::Usage, "cannot name a context so").why(error.to_string()));
    }
    if known.contexts.contains_key(name) && !force {
        return Err(Failure::new(Exit::Refused, format!("there is a context `{name}` already"))
            .remedy("choose another name, or replace it with --force"));
    }
    Ok(())
}

async fn issue(
    global: &Global,
    name: String,
) -> Result<(String, v1::IssueClientResponse), Failure> {
    let failed = |error: rcgen::Error| {
        Failure::new(Exit::Failed, "cannot make a key").why(error.to_string())
    };
    let key = rcgen::KeyPair::generate().map_err(failed)?;
    let request = rcgen::CertificateParams::default().serialize_request(&key).map_err(failed)?;
    let csr_pem = request.pem().map_err(failed)?;
    let session = Session::open(global).await?;
    let mut client = MembershipClient::new(session.channel.clone());
    let request = v1::IssueClientRequest { name, csr_pem };
    let issued = session.call("get a client certificate", client.issue_client(request)).await?;
    Ok((key.serialize_pem(), issued))
}

/// As [`Command::Renew`], for the context that these flags mean; nothing where they mean none.
pub(crate) async fn renew_in_use(global: &Global) -> Result<(), Failure> {
    let Ok(folder) = contexts::folder() else { return Ok(()) };
    let known = Contexts::load(&folder)?;
    let environment = |name: &str| std::env::var(name).ok();
    match Target::choose(global, environment, known.current.as_deref()) {
        Target::Context(name) => renew(global, &folder, known, &name).await.map(drop),
        Target::Socket(_) => Ok(()),
    }
}

/// Asks, as the context, for a certificate on a new key. The new files are complete before the
/// context names them, so that it works whatever happens meanwhile.
async fn renew(
    global: &Global,
    folder: &Path,
    mut known: Contexts,
    name: &str,
) -> Result<Contexts, Failure> {
    let old = known.get(name)?.clone();
    let what = format!("renew context `{name}`");
    let path = folder.join(&old.certificate);
    let der = CertificateDer::from_pem_file(&path).ok();
    let holder = der
        .as_ref()
        .and_then(|der| holder(der))
        .and_then(|(_, holder)| holder.strip_prefix("client/").map(str::to_owned));
    let client = holder.ok_or_else(|| {
        Failure::new(Exit::Usage, format!("cannot {what}"))
            .why(format!("{} is no client's certificate", path.display()))
    })?;
    let global = Global { context: Some(name.to_owned()), socket: None, ..global.clone() };
    let session = Session::open(&global).await?;
    let mut membership = MembershipClient::new(session.channel.clone());
    let ca = session.call(&what, membership.get_ca_status(v1::CaStatusRequest {})).await?;
    if matches!(ca.phase.as_str(), "trusting" | "renewing") {
        return Err(Failure::new(Exit::Refused, format!("cannot {what} now"))
            .why(format!("the cluster's CA is being rotated, in phase `{}`", ca.phase))
            .remedy("do it once `clusterctl cluster ca status` says `renewed`"));
    }
    let (key, issued) = issue(&global, client).await?;
    let serial = serial(&issued.certificate_pem).ok_or_else(|| {
        Failure::new(Exit::Failed, format!("cannot {what}")).why("the answer is no certificate")
    })?;
    let own = |file: &str| PathBuf::from(name).join(format!("{file}-{serial}.pem"));
    let context = Context {
        addresses: merged(&old.addresses, issued.api_addresses),
        ca: own("ca"),
        certificate: own("cert"),
        key: own("key"),
    };
    write_private(&folder.join(&context.key), key.as_bytes())?;
    write_private(&folder.join(&context.certificate), issued.certificate_pem.as_bytes())?;
    write_private(&folder.join(&context.ca), issued.ca_pem.as_bytes())?;
    known.contexts.insert(name.to_owned(), context);
    known.store(folder)?;
    // Those that were made by us; files that a person named stay.
    for file in [&old.key, &old.certificate, &old.ca] {
        if file.starts_with(name) {
            let _ = std::fs::remove_file(folder.join(file));
        }
    }
    Ok(known)
}

/// The known addresses first, in their order, then the new ones.
fn merged(known: &[String], new: Vec<String>) -> Vec<String> {
    let more = new.into_iter().filter(|address| !known.contains(address));
    known.iter().cloned().chain(more).collect()
}

/// The first half of a certificate's serial number.
fn serial(certificate_pem: &str) -> Option<String> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).ok()?;
    let (_, parsed) = X509Certificate::from_der(&der).ok()?;
    Some(parsed.raw_serial().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

fn finish(
    global: &Global,
    folder: &std::path::Path,
    mut known: Contexts,
    name: String,
    use_it: bool,
) -> Result<(), Failure> {
    if use_it {
        known.current = Some(name.clone());
    }
    known.store(folder)?;
    match show(folder, &known, &name) {
        Some(shown) => print_one(global, &shown),
        None => Ok(()),
    }
}

/// With the files where they are: a context that was made here has them beside the list.
fn show(folder: &Path, known: &Contexts, name: &str) -> Option<Shown> {
    let Context { addresses, ca, certificate, key } = known.contexts.get(name)?.clone();
    let (ca, certificate, key) = (folder.join(ca), folder.join(certificate), folder.join(key));
    let context = Context { addresses, ca, certificate, key };
    let current = known.current.as_deref() == Some(name);
    Some(Shown { name: name.to_owned(), current, context })
}

fn print_one(global: &Global, shown: &Shown) -> Result<(), Failure> {
    output::print(global.output, shown, |shown| {
        output::fields([
            ("context", shown.name.clone()),
            ("in use", yes(shown.current)),
            ("addresses", shown.context.addresses.join("\n")),
            ("ca", shown.context.ca.display().to_string()),
            ("certificate", shown.context.certificate.display().to_string()),
            ("key", shown.context.key.display().to_string()),
        ])
    })
}
