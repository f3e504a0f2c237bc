//! What a cluster takes that does nothing: three members with many VMs configured and none running.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::Serialize;

use crate::holdfast::{self, Agents};
use crate::member::{Members, Process};

/// What is measured, and what it may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Idle {
    pub(crate) vms: usize,
    /// So long.
    pub(crate) during: Duration,
}

/// Until what `apply` set off is over.
const SETTLE: Duration = Duration::from_secs(20);
const CPU_PERCENT: f64 = 1.0;
const RESIDENT_MIB: f64 = 100.0;
const WRITTEN_MB_PER_HOUR: f64 = 1.0;
const WITNESS_MIB: f64 = 20.0;
/// Until a witness that joins is through with it.
const WITNESS_SETTLES: Duration = Duration::from_secs(30);

/// What the cluster takes.
#[derive(Debug, Serialize)]
pub(crate) struct Costs {
    /// In the order of their numbers.
    members: Vec<Cost>,
    /// A witness that joins in the end, MiB.
    witness_resident_mib: f64,
}

/// One member's.
#[derive(Debug, Serialize)]
pub(crate) struct Cost {
    leads: bool,
    /// Of one core.
    cpu_percent: f64,
    resident_mib: f64,
    written_mb_per_hour: f64,
}

/// Starts a cluster, measures it, and ends it.
pub(crate) async fn measure(folder: &Path, idle: Idle) -> anyhow::Result<Costs> {
    let mut agents = holdfast::start(folder).await?;
    eprintln!("{} VMs are written", idle.vms);
    write_vms(&agents, folder, idle.vms)?;
    tokio::time::sleep(SETTLE).await;
    eprintln!("nothing is done for {} s", idle.during.as_secs());
    let before = figures(&agents)?;
    let begin = Instant::now();
    tokio::time::sleep(idle.during).await;
    let (seconds, after) = (begin.elapsed().as_secs_f64(), figures(&agents)?);
    let leader = agents.leader().await?;
    let costs = before.iter().zip(&after).zip(agents.processes()).enumerate();
    let members: anyhow::Result<Vec<Cost>> = costs
        .map(|(member, ((before, after), process))| {
            #[allow(clippy::cast_precision_loss, reason = "figures for people")]
            let written = after.1.saturating_sub(before.1) as f64 / 1e6;
            Ok(Cost {
                leads: member == leader,
                cpu_percent: after.0.saturating_sub(before.0).as_secs_f64() / seconds * 100.0,
                resident_mib: resident_mib(process)?,
                written_mb_per_hour: written / seconds * 3600.0,
            })
        })
        .collect();
    let members = members?;
    eprintln!("a witness joins");
    let witness = agents.add_witness().await?;
    tokio::time::sleep(WITNESS_SETTLES).await;
    Ok(Costs { members, witness_resident_mib: resident_mib(witness)? })
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn resident_mib(process: &Process) -> anyhow::Result<f64> {
    Ok(process.resident_bytes()? as f64 / f64::from(1 << 20))
}

fn figures(agents: &Agents) -> anyhow::Result<Vec<(Duration, u64)>> {
    let of = |process: &Process| Ok((process.cpu_time()?, process.written_bytes()?));
    agents.processes().iter().map(of).collect()
}

/// As a person would: a folder of documents, applied.
fn write_vms(agents: &Agents, folder: &Path, vms: usize) -> anyhow::Result<()> {
    let documents = folder.join("documents");
    std::fs::create_dir_all(documents.join("vms"))?;
    for number in 0..vms {
        let name = format!("vm{number:05}");
        let text = format!(
            "name = \"{name}\"\nmemory = \"1GiB\"\n\n[boot]\nkernel = \"local/vmlinuz\"\n\
             cmdline = \"console=ttyS0 root=/dev/vda\"\n\n[[disks]]\nimage = \"local/{name}.raw\"\nsize = \"1GiB\"\n"
        );
        std::fs::write(documents.join(format!("vms/{name}.toml")), text)?;
    }
    let pool = folder.join("pool");
    std::fs::create_dir_all(&pool)?;
    // It has a kernel's first bytes alone: none of them ever starts.
    std::fs::write(pool.join("vmlinuz"), b"\x7fELF")?;
    let path = pool.display().to_string();
    agents.ctl(0, &["storage", "create", "local", "--kind", "shared-dir", "--path", &path])?;
    agents.ctl(0, &["config", "apply", "-f", &documents.display().to_string()])?;
    let listed = agents.ctl(0, &["-o", "json", "vm", "list"])?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let there = listed["vms"].as_array().or(listed.as_array()).map_or(0, Vec::len);
    ensure!(there == vms, "{there} VMs of {vms} are there");
    Ok(())
}

/// The costs beside what they may be.
pub(crate) fn table(costs: &Costs) -> String {
    let Costs { members: costs, witness_resident_mib } = costs;
    let mut text = format!(
        "{:<8} {:>16} {:>20} {:>18}\n",
        "member", "CPU, % of a core", "resident memory, MiB", "written, MB/hour"
    );
    for (number, cost) in (1..).zip(costs) {
        let name = format!("{number}{}", if cost.leads { " (leads)" } else { "" });
        text += &format!(
            "{name:<11} {:>13.2} {:>20.1} {:>18.2}\n",
            cost.cpu_percent, cost.resident_mib, cost.written_mb_per_hour
        );
    }
    let most = |of: fn(&Cost) -> f64| costs.iter().map(of).fold(0.0, f64::max);
    let verdict = |most: f64, bar: f64| if most < bar { "holds" } else { "MISSED" };
    text += &format!(
        "{:<11} {:>13} {:>20} {:>18}\n",
        "bar",
        format!("< {CPU_PERCENT} {}", verdict(most(|cost| cost.cpu_percent), CPU_PERCENT)),
        format!("< {RESIDENT_MIB} {}", verdict(most(|cost| cost.resident_mib), RESIDENT_MIB)),
        format!(
            "< {WRITTEN_MB_PER_HOUR} {}",
            verdict(most(|cost| cost.written_mb_per_hour), WRITTEN_MB_PER_HOUR)
        ),
    );
    text += &format!(
        "a witness   {witness_resident_mib:>33.1} (bar: < {WITNESS_MIB} {})\n",
        verdict(*witness_resident_mib, WITNESS_MIB)
    );
    text
}
