//! The target's agent: starts the receiving process, and runs or ends it as its caller has read.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use proto::record::NetworkRecord;
use proto::v1::{FinishMigrationResponse, PrepareMigrationRequest, PrepareMigrationResponse};
use proto::{Generation, Name};

use super::{Manifest, MigrationError, PROTOCOL};
use crate::storage::Pools;
use crate::supervisor::{IncomingLaunch, Launch, Stop, Supervisor, VmState};

/// The receiving side of this node.
#[derive(Debug, Clone)]
pub struct Incoming {
    supervisor: Supervisor,
    /// Where receiving processes listen; each takes a port of the kernel's choice.
    listen: IpAddr,
    /// The host that sources reach them at.
    advertise: String,
}

impl Incoming {
    /// Receives on `listen`; sources connect to `advertise` (a host name or address).
    #[must_use]
    pub fn new(supervisor: Supervisor, listen: IpAddr, advertise: String) -> Self {
        Self { supervisor, listen, advertise }
    }

    /// Starts a receiving VM process. An HA VM needs this node's lease deadline.
    ///
    /// # Errors
    /// [`MigrationError`]: what is missing here; nothing is left then.
    pub async fn prepare(
        &self,
        request: &PrepareMigrationRequest,
        pools: &Pools,
        networks: &[NetworkRecord],
        deadline_ns: Option<u64>,
    ) -> Result<PrepareMigrationResponse, MigrationError> {
        let manifest: Manifest = serde_json::from_slice(&request.launch)
            .map_err(|error| MigrationError::Request(format!("the VM's description: {error}")))?;
        if manifest.spec.name.as_str() != request.vm {
            return Err(MigrationError::Request("it names two different VMs".into()));
        }
        let spec = manifest
            .spec
            .validate()
            .map_err(|error| MigrationError::Request(format!("the VM's description: {error}")))?;
        let protocol = request.protocol_max.min(*PROTOCOL.end());
        if protocol < request.protocol_min.max(*PROTOCOL.start()) {
            return Err(MigrationError::Request(format!(
                "the source speaks versions {} to {} of the migration stream, this node {} to {}: \
                 upgrade the older node",
                request.protocol_min,
                request.protocol_max,
                PROTOCOL.start(),
                PROTOCOL.end()
            )));
        }
        let generation = Generation(request.generation);
        // Off the async threads: storage that hangs must not hold up the leases, if this node leads.
        let resolved = tokio::task::spawn_blocking({
            let (spec, vm_id) = (spec.clone(), manifest.vm_id);
            let (pools, networks) = (pools.clone(), networks.to_vec());
            move || Launch::resolve(&spec, vm_id, generation, &pools, &networks, false)
        });
        let mut launch = resolved
            .await
            .map_err(|error| MigrationError::Request(format!("internal error: {error}")))??;
        for (nic, mac) in launch.nics.iter_mut().zip(manifest.macs) {
            nic.mac = mac;
        }
        launch.ha = manifest.ha.unwrap_or(launch.ha);
        launch.cpuid = manifest.cpuid;
        launch.deadline_ns = deadline_ns.filter(|_| launch.ha);
        launch.incoming = Some(IncomingLaunch {
            migration_id: request.migration_id.clone(),
            source_fingerprint: request.source_fingerprint.clone(),
            listen: SocketAddr::new(self.listen, 0),
            protocol,
        });
        let started = self.supervisor.start(launch).await?;
        let (Some(listen), Some(target_fingerprint)) = (started.listen, started.fingerprint) else {
            self.supervisor.stop(&spec.name, Stop::Kill).await?;
            return Err(MigrationError::Request("the receiving process does not listen".into()));
        };
        let address = host_port(&self.advertise, listen.port());
        Ok(PrepareMigrationResponse { address, target_fingerprint, protocol })
    }

    /// Runs an incoming VM: only after the caller has read the commit. Asking again is fine.
    ///
    /// # Errors
    /// [`MigrationError::UnknownIncoming`], or the process's own.
    pub async fn run(
        &self,
        name: &Name,
        migration_id: &str,
        generation: Generation,
        deadline_ns: Option<u64>,
    ) -> Result<FinishMigrationResponse, MigrationError> {
        let begin = Instant::now();
        let vm = self.supervisor.status(name).await?;
        let runs_already = vm.migration_id.is_none()
            && vm.generation == generation
            && matches!(vm.state, VmState::Running | VmState::Paused);
        if !runs_already {
            if vm.migration_id.as_deref() != Some(migration_id) {
                return Err(self.unknown(name, migration_id));
            }
            let deadline_ns = deadline_ns.filter(|_| vm.ha);
            self.supervisor.run_incoming(name, migration_id, generation, deadline_ns).await?;
        }
        let resumed_after_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(FinishMigrationResponse { resumed_after_us })
    }

    /// Ends the receiving process of a migration that was not committed. One that runs the VM
    /// already, or belongs to another attempt, is left alone.
    ///
    /// # Errors
    /// [`VmError`] if it cannot be killed.
    pub async fn abort(
        &self,
        name: &Name,
        migration_id: &str,
        reason: &str,
    ) -> Result<(), MigrationError> {
        let Ok(vm) = self.supervisor.status(name).await else { return Ok(()) };
        if vm.migration_id.as_deref() == Some(migration_id) {
            tracing::info!(vm = %name, migration_id, reason, "incoming migration given up");
            self.supervisor.stop(name, Stop::Kill).await?;
        }
        Ok(())
    }

    fn unknown(&self, name: &Name, migration_id: &str) -> MigrationError {
        MigrationError::UnknownIncoming {
            name: name.clone(),
            migration_id: migration_id.chars().take(64).collect(),
        }
    }
}

/// Joins a host and a port; an IPv6 address gets its brackets.
fn host_port(host: &str, port: u16) -> String {
    match host.parse::<IpAddr>() {
        Ok(address) => SocketAddr::new(address, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::host_port;

    #[test]
    fn addresses_are_joined_for_both_families() {
        assert_eq!(host_port("10.0.0.1", 7), "10.0.0.1:7");
        assert_eq!(host_port("fd00::1", 7), "[fd00::1]:7");
        assert_eq!(host_port("node1", 7), "node1:7");
    }
}
