//! An agent that answers from a script, on a Unix socket, and the real clusterctl against it.

#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod config;

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proto::v1;
use proto::v1::task_update::Update;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// How the stream of a backup goes on after what was set.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum BackupEnd {
    #[default]
    Ends,
    Breaks,
    Stalls,
}

/// What happened to the agent.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) follows: AtomicUsize,
    pub(crate) cancels: AtomicUsize,
    pub(crate) imported: std::sync::Mutex<Vec<u8>>,
    /// What the last import said of itself.
    pub(crate) header: std::sync::Mutex<v1::Image>,
    pub(crate) config: config::Store,
    pub(crate) backup: std::sync::Mutex<(Vec<u8>, BackupEnd)>,
    pub(crate) restored: std::sync::Mutex<Vec<u8>>,
    /// What comparing the copies comes to.
    pub(crate) verification: std::sync::Mutex<v1::Verification>,
    /// Who signs clients' certificates: key, certificate (PEM), and where its nodes are. None: nobody.
    pub(crate) issuer: std::sync::Mutex<Option<(String, String, String)>>,
    /// How far the rotation of the CA is; empty: there is none.
    pub(crate) ca: std::sync::Mutex<v1::CaStatus>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Agent(pub(crate) Arc<Seen>);

fn vm(name: &str) -> v1::Vm {
    v1::Vm {
        name: name.to_owned(),
        node: "node1".to_owned(),
        phase: "started".to_owned(),
        memory_bytes: 512 << 20,
        cpus: 2,
        ha: true,
        ..v1::Vm::default()
    }
}

fn task(id: &str, state: &str) -> v1::Task {
    let error = if state == "failed" { "kernel shared/vmlinuz is missing" } else { "" };
    let result = r#"{"total_ms":1400,"downtime_ms":64,"bytes":268435456,"rounds":4}"#;
    v1::Task {
        task_id: id.to_owned(),
        kind: "vm.migrate".to_owned(),
        subject: "web".to_owned(),
        state: state.to_owned(),
        error: error.to_owned(),
        result: result.to_owned(),
        started_unix_ms: 1_000,
        ended_unix_ms: Some(2_500),
        ..v1::Task::default()
    }
}

fn reference(id: &str) -> Answer<v1::TaskRef> {
    Ok(Response::new(v1::TaskRef { task_id: id.to_owned() }))
}

fn stream<T: Send + 'static>(items: Vec<Result<T, Status>>) -> Answers<T> {
    Box::pin(tokio_stream::iter(items))
}

fn update(update: Update) -> Result<v1::TaskUpdate, Status> {
    Ok(v1::TaskUpdate { update: Some(update) })
}

#[tonic::async_trait]
impl v1::vms_server::Vms for Agent {
    async fn create(&self, request: Request<v1::CreateVmRequest>) -> Answer<v1::CreateVmResponse> {
        let request = request.into_inner();
        proto::VmSpec::parse(&request.document)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let task_id = if request.start { "1-1".to_owned() } else { String::new() };
        Ok(Response::new(v1::CreateVmResponse { vm: Some(vm("web")), task_id }))
    }
    async fn list(&self, _: Request<v1::ListVmsRequest>) -> Answer<v1::ListVmsResponse> {
        Ok(Response::new(v1::ListVmsResponse { vms: vec![vm("web"), vm("database")] }))
    }
    async fn show(&self, request: Request<v1::ShowVmRequest>) -> Answer<v1::Vm> {
        match request.into_inner().vm.as_str() {
            "web" => Ok(Response::new(vm("web"))),
            other => Err(Status::not_found(format!("there is no VM `{other}`"))),
        }
    }
    async fn start(&self, request: Request<v1::VmRequest>) -> Answer<v1::TaskRef> {
        match request.into_inner().vm.as_str() {
            "broken" => reference("1-2"),
            "flaky" => reference("1-3"),
            "slow" => reference("1-4"),
            "no-quorum" => Err(Status::unavailable("no quorum: 1 of 3 voters answers")),
            _ => reference("1-1"),
        }
    }
    async fn shutdown(&self, _: Request<v1::ShutdownVmRequest>) -> Answer<v1::TaskRef> {
        reference("1-1")
    }
    async fn stop(&self, _: Request<v1::VmRequest>) -> Answer<v1::TaskRef> {
        reference("1-1")
    }
    async fn reset(&self, _: Request<v1::VmRequest>) -> Answer<v1::TaskRef> {
        reference("1-1")
    }
    async fn pause(&self, _: Request<v1::VmRequest>) -> Answer<v1::TaskRef> {
        reference("1-1")
    }
    async fn resume(&self, _: Request<v1::VmRequest>) -> Answer<v1::TaskRef> {
        reference("1-1")
    }
    async fn migrate(&self, request: Request<v1::MigrateVmRequest>) -> Answer<v1::TaskRef> {
        match request.into_inner().target.as_str() {
            "node1" => Err(Status::failed_precondition("vm web is on node1 already")),
            "slow" => reference("1-4"),
            _ => reference("1-1"),
        }
    }
    async fn delete(&self, _: Request<v1::VmRequest>) -> Answer<v1::TaskRef> {
        reference("1-1")
    }
    type ConsoleStream = Answers<v1::ConsoleOutput>;
    /// Says what it hears, in capitals, and hangs up at a `q`.
    async fn console(
        &self,
        input: Request<Streaming<v1::ConsoleInput>>,
    ) -> Answer<Answers<v1::ConsoleOutput>> {
        let heard = input.into_inner().map_while(|input| {
            let data = input.ok()?.data;
            (!data.contains(&b'q'))
                .then(|| Ok(v1::ConsoleOutput { data: data.to_ascii_uppercase() }))
        });
        Ok(Response::new(Box::pin(heard)))
    }
    type LogStream = Answers<v1::ConsoleOutput>;
    async fn log(&self, _: Request<v1::VmLogRequest>) -> Answer<Answers<v1::ConsoleOutput>> {
        let data = |text: &str| Ok(v1::ConsoleOutput { data: text.as_bytes().to_vec() });
        Ok(Response::new(stream(vec![data("boot\r\n"), data("login: ")])))
    }
}

#[tonic::async_trait]
impl v1::tasks_server::Tasks for Agent {
    async fn list(&self, _: Request<v1::ListTasksRequest>) -> Answer<v1::ListTasksResponse> {
        let progress = v1::TaskProgress { text: "round 1".to_owned(), done: 1, total: 4 };
        let noted = |id: &str, state: &str| v1::Task {
            progress: Some(progress.clone()),
            ..task(id, state)
        };
        let running = v1::Task { ended_unix_ms: None, ..noted("1-3", "running") };
        let tasks = vec![running, noted("1-2", "failed"), noted("1-1", "done")];
        Ok(Response::new(v1::ListTasksResponse { tasks }))
    }
    async fn get(&self, request: Request<v1::GetTaskRequest>) -> Answer<v1::Task> {
        Ok(Response::new(task(&request.into_inner().task_id, "done")))
    }
    type FollowStream = Answers<v1::TaskUpdate>;
    async fn follow(
        &self,
        request: Request<v1::GetTaskRequest>,
    ) -> Answer<Answers<v1::TaskUpdate>> {
        let id = request.into_inner().task_id;
        let before = self.0.follows.fetch_add(1, Ordering::SeqCst);
        let log = |text: &str| update(Update::Log(text.to_owned()));
        let progress = v1::TaskProgress { text: "round 1".to_owned(), done: 1, total: 4 };
        let ended = |state: &str| update(Update::Ended(task(&id, state)));
        let answers = match id.as_str() {
            "1-1" => stream(vec![log("first"), update(Update::Progress(progress)), ended("done")]),
            "1-2" => stream(vec![log("first"), ended("failed")]),
            // Breaks once; then tells everything again from the start.
            "1-3" if before == 0 => stream(vec![log("first"), Err(Status::unavailable("gone"))]),
            "1-3" => stream(vec![log("first"), log("second"), ended("done")]),
            "1-4" if self.0.cancels.load(Ordering::SeqCst) > 0 => stream(vec![ended("cancelled")]),
            "1-4" => Box::pin(stream(vec![log("first")]).chain(tokio_stream::pending())),
            _ => return Err(Status::not_found(format!("there is no task {id}"))),
        };
        Ok(Response::new(answers))
    }
    async fn cancel(&self, request: Request<v1::GetTaskRequest>) -> Answer<v1::Task> {
        self.0.cancels.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(task(&request.into_inner().task_id, "cancelled")))
    }
}

#[tonic::async_trait]
impl v1::storage_server::Storage for Agent {
    async fn list_pools(&self, _: Request<v1::ListPoolsRequest>) -> Answer<v1::ListPoolsResponse> {
        Ok(Response::new(v1::ListPoolsResponse::default()))
    }
    async fn create_pool(&self, request: Request<v1::CreatePoolRequest>) -> Answer<v1::Pool> {
        let v1::CreatePoolRequest { pool, create_folder } = request.into_inner();
        let pool = pool.unwrap_or_default();
        if pool.path == "/missing" && !create_folder {
            return Err(Status::failed_precondition("/missing does not exist: use --create"));
        }
        Ok(Response::new(pool))
    }
    async fn list_images(
        &self,
        _: Request<v1::ListImagesRequest>,
    ) -> Answer<v1::ListImagesResponse> {
        let image = |name: &str, kind: &str| v1::Image {
            pool: "shared".to_owned(),
            name: name.to_owned(),
            kind: kind.to_owned(),
            ..v1::Image::default()
        };
        let images = vec![image("vmlinuz", "kernel"), image("odd", "")];
        Ok(Response::new(v1::ListImagesResponse { images }))
    }
    async fn import_image(
        &self,
        request: Request<Streaming<v1::ImportImageRequest>>,
    ) -> Answer<v1::Image> {
        let mut chunks = request.into_inner();
        let first = chunks.message().await?.and_then(|first| first.header);
        let header = first.ok_or_else(|| Status::invalid_argument("no header"))?;
        if header.pool == "full" {
            return Err(Status::resource_exhausted("pool full has no space left"));
        }
        while let Some(chunk) = chunks.message().await? {
            self.0.imported.lock().unwrap().extend(chunk.data);
        }
        self.0.header.lock().unwrap().clone_from(&header);
        Ok(Response::new(header))
    }
    async fn delete_image(
        &self,
        _: Request<v1::DeleteImageRequest>,
    ) -> Answer<v1::DeleteImageResponse> {
        Ok(Response::new(v1::DeleteImageResponse {}))
    }
    async fn delete_pool(
        &self,
        request: Request<v1::DeletePoolRequest>,
    ) -> Answer<v1::DeletePoolResponse> {
        match request.into_inner().name.as_str() {
            "used" => Err(Status::failed_precondition("pool `used` is used by VM `web`")),
            _ => Ok(Response::new(v1::DeletePoolResponse {})),
        }
    }
    async fn delete_network(
        &self,
        request: Request<v1::DeleteNetworkRequest>,
    ) -> Answer<v1::DeleteNetworkResponse> {
        match request.into_inner().name.as_str() {
            "used" => Err(Status::failed_precondition("network `used` is used by VM `web`")),
            _ => Ok(Response::new(v1::DeleteNetworkResponse {})),
        }
    }
    async fn list_networks(
        &self,
        _: Request<v1::ListNetworksRequest>,
    ) -> Answer<v1::ListNetworksResponse> {
        Ok(Response::new(v1::ListNetworksResponse::default()))
    }
    async fn create_network(
        &self,
        request: Request<v1::CreateNetworkRequest>,
    ) -> Answer<v1::Network> {
        Ok(Response::new(request.into_inner().network.unwrap_or_default()))
    }
}

/// Issued three hours ago, good for 30 hours more.
/// A client's certificate, of cluster c1.
fn sign(key: &str, ca: &str, asked: &v1::IssueClientRequest) -> Result<String, rcgen::Error> {
    let issuer = rcgen::Issuer::from_ca_cert_pem(ca, rcgen::KeyPair::from_pem(key)?)?;
    let mut csr = rcgen::CertificateSigningRequestParams::from_pem(&asked.csr_pem)?;
    let uri = format!("holdfast://c1/client/{}", asked.name);
    csr.params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into()?)];
    csr.params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    Ok(csr.signed_by(&issuer)?.pem())
}

fn certificate(kind: &str, name: &str, serial: &str, state: &str) -> v1::Certificate {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let now_unix_s = now.as_secs();
    v1::Certificate {
        kind: kind.to_owned(),
        name: name.to_owned(),
        serial: serial.to_owned(),
        issued_unix_s: now_unix_s - 3600 * 3,
        expires_unix_s: now_unix_s + 3600 * 30,
        state: state.to_owned(),
        ..v1::Certificate::default()
    }
}

#[tonic::async_trait]
impl v1::membership_server::Membership for Agent {
    async fn init(&self, _: Request<v1::InitRequest>) -> Answer<v1::InitResponse> {
        Err(Status::permission_denied("for root alone"))
    }
    async fn join(&self, _: Request<v1::JoinRequest>) -> Answer<v1::JoinResponse> {
        Err(Status::permission_denied("the cluster refused: the token was used already"))
    }
    async fn create_token(
        &self,
        _: Request<v1::CreateTokenRequest>,
    ) -> Answer<v1::CreateTokenResponse> {
        Ok(Response::new(v1::CreateTokenResponse::default()))
    }
    async fn status(&self, _: Request<v1::ClusterStatusRequest>) -> Answer<v1::ClusterStatus> {
        Ok(Response::new(v1::ClusterStatus::default()))
    }
    async fn remove_node(
        &self,
        _: Request<v1::RemoveNodeRequest>,
    ) -> Answer<v1::RemoveNodeResponse> {
        Ok(Response::new(v1::RemoveNodeResponse::default()))
    }
    async fn transfer_leader(
        &self,
        _: Request<v1::TransferLeaderRequest>,
    ) -> Answer<v1::TransferLeaderResponse> {
        Ok(Response::new(v1::TransferLeaderResponse::default()))
    }
    async fn restore(
        &self,
        request: Request<Streaming<v1::RestoreRequest>>,
    ) -> Answer<v1::RestoreResponse> {
        let mut chunks = request.into_inner();
        let first = chunks.message().await?.and_then(|first| first.names);
        let names = first.ok_or_else(|| Status::invalid_argument("no names"))?;
        if names.cluster_name == "member" {
            return Err(Status::already_exists("this node already belongs to the cluster `lab`"));
        }
        while let Some(chunk) = chunks.message().await? {
            self.0.restored.lock().unwrap().extend(chunk.data);
        }
        let cluster_name = names.cluster_name;
        Ok(Response::new(v1::RestoreResponse {
            cluster_name,
            vms: 3,
            ..v1::RestoreResponse::default()
        }))
    }
    type BackupStream = Answers<v1::BackupChunk>;
    /// What was set, and then the end, an error, or silence.
    async fn backup(&self, _: Request<v1::BackupRequest>) -> Answer<Answers<v1::BackupChunk>> {
        let (bytes, end) = self.0.backup.lock().unwrap().clone();
        let pieces = bytes.chunks(1000).map(|data| Ok(v1::BackupChunk { data: data.to_vec() }));
        let pieces = stream(pieces.collect());
        Ok(Response::new(match end {
            BackupEnd::Ends => pieces,
            BackupEnd::Breaks => {
                Box::pin(pieces.chain(stream(vec![Err(Status::internal("its disk failed"))])))
            }
            BackupEnd::Stalls => Box::pin(pieces.chain(tokio_stream::pending())),
        }))
    }
    async fn verify(&self, _: Request<v1::VerifyRequest>) -> Answer<v1::Verification> {
        Ok(Response::new(self.0.verification.lock().unwrap().clone()))
    }
    async fn who_am_i(&self, _: Request<v1::WhoAmIRequest>) -> Answer<v1::WhoAmIResponse> {
        let right = |call: &str, needs: &str, allowed| v1::CallRight {
            call: call.into(),
            needs: needs.into(),
            detail: String::new(),
            allowed,
        };
        Ok(Response::new(v1::WhoAmIResponse {
            kind: "client".into(),
            name: "ann".into(),
            role: "viewer".into(),
            reason: "access/ann.toml".into(),
            calls: vec![right("Vms.Show", "viewer", true), right("Vms.Start", "operator", false)],
        }))
    }
    async fn issue_client(
        &self,
        request: Request<v1::IssueClientRequest>,
    ) -> Answer<v1::IssueClientResponse> {
        let issuer = self.0.issuer.lock().unwrap().clone();
        let (key, ca_pem, address) =
            issuer.ok_or_else(|| Status::permission_denied("for root alone"))?;
        let asked = request.into_inner();
        let certificate_pem = sign(&key, &ca_pem, &asked).map_err(|error| {
            Status::invalid_argument(format!("no certificate for {}: {error}", asked.name))
        })?;
        let api_addresses = vec![address];
        Ok(Response::new(v1::IssueClientResponse {
            certificate_pem,
            ca_pem,
            api_addresses,
            role: "admin".into(),
        }))
    }
    async fn list_certificates(
        &self,
        _: Request<v1::ListCertificatesRequest>,
    ) -> Answer<v1::ListCertificatesResponse> {
        let node = certificate("node", "node1", "4a01", "expiring");
        let trouble = "no leader is known".to_owned();
        let node = v1::Certificate { node_id: 1, trouble, ..node };
        let client = certificate("client", "ann", "4b02", "revoked");
        let certificates = vec![certificate("ca", "lab", "4c03", "valid"), node, client];
        Ok(Response::new(v1::ListCertificatesResponse { certificates }))
    }
    async fn renew_certificates(
        &self,
        request: Request<v1::RenewCertificatesRequest>,
    ) -> Answer<v1::RenewCertificatesResponse> {
        let one = |node: &str, node_id, error: &str| v1::RenewedCertificate {
            node: node.to_owned(),
            node_id,
            certificate: error.is_empty().then(|| certificate("node", node, "4d04", "valid")),
            error: error.to_owned(),
        };
        let node1 = one("node1", 1, "");
        let renewed = match request.into_inner().node.as_str() {
            "" => vec![node1, one("node2", 2, "it cannot be asked: connection refused")],
            "node1" => vec![node1],
            other => return Err(Status::not_found(format!("there is no node `{other}`"))),
        };
        Ok(Response::new(v1::RenewCertificatesResponse { renewed }))
    }
    async fn rotate_ca(&self, request: Request<v1::RotateCaRequest>) -> Answer<v1::CaStatus> {
        let mut ca = self.0.ca.lock().unwrap();
        match (request.into_inner().finish, ca.phase.as_str()) {
            (false, _) => {
                ca.phase = "trusting".to_owned();
                ca.waiting_for = vec!["node3 (does not trust the new CA yet)".to_owned()];
            }
            (true, "renewed") => *ca = v1::CaStatus::default(),
            (true, "stable") => {}
            (true, _) => return Err(Status::invalid_argument("it waits for node3")),
        }
        Ok(Response::new(ca.clone()))
    }
    /// Each look finds it one phase further.
    async fn get_ca_status(&self, _: Request<v1::CaStatusRequest>) -> Answer<v1::CaStatus> {
        let mut ca = self.0.ca.lock().unwrap();
        let phase = std::mem::take(&mut ca.phase);
        let next = match phase.as_str() {
            "" => "stable",
            "trusting" => "renewing",
            "renewing" => "renewed",
            other => other,
        };
        ca.phase = next.to_owned();
        if next == "renewed" {
            (ca.waiting_for, ca.clients) = (Vec::new(), vec!["ann".to_owned()]);
        }
        Ok(Response::new(ca.clone()))
    }
    async fn revoke_certificates(
        &self,
        request: Request<v1::RevokeCertificatesRequest>,
    ) -> Answer<v1::RevokeCertificatesResponse> {
        match request.into_inner().what.as_str() {
            "ann" => {
                let revoked = vec![certificate("client", "ann", "4b02", "revoked")];
                Ok(Response::new(v1::RevokeCertificatesResponse { revoked }))
            }
            other => Err(Status::not_found(format!("no certificate is of a client `{other}`"))),
        }
    }
}

/// A running mock and its folder; both go with it.
pub(crate) struct Mock {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) agent: Agent,
    pub(crate) runtime: tokio::runtime::Runtime,
}

impl Mock {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let agent = Agent::default();
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(folder.path().join("agent.sock")).unwrap()
        };
        let server = tonic::transport::Server::builder()
            .add_service(v1::vms_server::VmsServer::new(agent.clone()))
            .add_service(v1::membership_server::MembershipServer::new(agent.clone()))
            .add_service(v1::config_server::ConfigServer::new(agent.clone()))
            .add_service(v1::tasks_server::TasksServer::new(agent.clone()))
            .add_service(v1::storage_server::StorageServer::new(agent.clone()));
        runtime.spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        Self { folder, agent, runtime }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// clusterctl against the socket.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        let mut command = command(self.folder.path());
        Ran::of(command.env("HOLDFAST_SOCKET", self.socket()).args(arguments).output().unwrap())
    }
}

/// clusterctl with its own configuration folder and nothing of the user's.
pub(crate) fn command(folder: &Path) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_clusterctl"));
    command.env_remove("HOLDFAST_SOCKET").env_remove("HOLDFAST_CONTEXT");
    command.env("HOLDFAST_CONFIG_DIR", folder.join("config"));
    command.stdin(std::process::Stdio::null());
    command
}

/// How it went.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) exit: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            exit: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}
