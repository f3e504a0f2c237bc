//! What cannot be done is refused with a reason and a remedy, and leaves everything as it was.

use std::time::Duration;

use anyhow::ensure;
use proto::v1::CreateTokenResponse;
use tests::lab::cluster::Guest;
use tests::lab::{Lab, Options, wait_until};

const BOOT: Duration = Duration::from_secs(120);

/// Runs `clusterctl`, which must refuse with a message that has all these words.
fn refused(lab: &Lab, node: u32, arguments: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let output = lab.ctl_output(node, arguments)?;
    let said = output.stderr.to_lowercase();
    println!("clusterctl {} -> {}: {}", arguments.join(" "), output.code, output.stderr.trim());
    ensure!(output.code != 0, "clusterctl {} was not refused", arguments.join(" "));
    for word in words {
        ensure!(said.contains(word), "the message does not name `{word}`: {}", output.stderr);
    }
    Ok(())
}

fn refused_document(lab: &Lab, document: &str, words: &[&str]) -> anyhow::Result<()> {
    let write = ["sh", "-c", "cat >/tmp/bad.toml"];
    lab.run(1, &write, document.as_bytes(), Duration::from_secs(20))?.ok()?;
    refused(lab, 1, &["vm", "create", "-f", "/tmp/bad.toml"], words)
}

#[test]
fn joining_takes_a_fresh_token_and_a_right_clock() -> anyhow::Result<()> {
    let lab = Lab::up(&Options::temporary(3), &mut |text| println!("{text}"))?;
    for number in lab.numbers() {
        lab.wait_agent(number)?;
    }
    lab.ctl(1, &["cluster", "init", "--name", "lab"])?;
    let token = |arguments: &[&str]| {
        let create = [&["cluster", "token", "create"], arguments].concat();
        lab.ctl_json::<CreateTokenResponse>(1, &create).map(|answer| answer.token)
    };
    let used = token(&[])?;
    lab.ctl(2, &["cluster", "join", &used])?;

    refused(&lab, 3, &["cluster", "join", &used], &["token"])?;
    refused(&lab, 3, &["cluster", "join", "nonsense"], &["token"])?;
    let mut forged = token(&[])?;
    let last = forged.pop().unwrap_or('a');
    forged.push(if last == 'a' { 'b' } else { 'a' });
    refused(&lab, 3, &["cluster", "join", &forged], &["token"])?;
    let expired = token(&["--ttl", "1s"])?;
    let at = std::time::Instant::now();
    wait_until(Duration::from_secs(10), "a second and a bit", || Ok(at.elapsed().as_secs() >= 3))?;
    refused(&lab, 3, &["cluster", "join", &expired], &["token", "expired"])?;

    let fresh = token(&[])?;
    lab.sh(3, "date -s @$(($(date +%s) + 3600))")?;
    refused(&lab, 3, &["cluster", "join", &fresh], &["clock"])?;
    lab.sh(3, "date -s @$(($(date +%s) - 3600))")?;
    refused(&lab, 3, &["cluster", "join", &token(&[])?, "--node-name", "node1"], &["node1"])?;

    lab.ctl(3, &["cluster", "join", &token(&[])?])?;
    lab.wait_healthy(3)?;
    lab.down()
}

#[test]
fn nonsense_is_refused_and_changes_nothing() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    let web = Guest::new("web", 100);
    lab.create_guest(1, &web, Some(1))?;
    lab.await_guest(1, &web, BOOT)?;

    // Documents.
    let other = Guest::new("other", 101);
    let good = other.document();
    refused_document(&lab, &good.replace("cpus =", "cpuss ="), &["cpuss", "line 2"])?;
    refused_document(&lab, &good.replace("cpus = 1", "cpus = 0"), &["`cpus` is refused"])?;
    refused_document(&lab, &good.replace("\"256MiB\"", "\"64GiB\""), &["memory"])?;
    refused_document(&lab, &good.replace("shared/vmlinuz", "shared/missing"), &["missing"])?;
    refused_document(&lab, &good.replace("shared/other.raw", "shared/web.raw"), &["web"])?;
    refused_document(&lab, &web.document(), &["web"])?;
    refused_document(&lab, &good.replace("\"lan\"", "\"nowhere\""), &["nowhere"])?;
    refused(&lab, 1, &["vm", "show", "other"], &["other"])?;

    // Migrations.
    refused(&lab, 2, &["vm", "migrate", "web", "node1"], &["node1"])?;
    refused(&lab, 2, &["vm", "migrate", "web", "node9"], &["node9"])?;
    lab.ctl(1, &["node", "drain", "node3"])?;
    refused(&lab, 2, &["vm", "migrate", "web", "node3"], &["node3"])?;
    lab.ctl(1, &["node", "resume", "node3"])?;
    lab.ctl(1, &["vm", "stop", "web"])?;
    refused(&lab, 2, &["vm", "migrate", "web", "node2"], &["web"])?;

    // Files that are not what they should be: the import is refused, and so is the start where a
    // file was damaged behind the cluster's back.
    lab.sh(1, "head -c 3000000 /dev/urandom >/shared/import/rubbish")?;
    let import = ["image", "import", "/shared/import/rubbish", "--pool", "shared", "--kind"];
    refused(&lab, 1, &[&import[..], &["kernel"]].concat(), &["not a kernel"])?;
    lab.sh(1, "head -c 100000 /shared/import/vmlinuz >/shared/pool/rubbish")?;
    let broken = Guest { ha: false, disk: false, ..Guest::new("broken", 102) };
    let document = broken.document().replace("shared/vmlinuz", "shared/rubbish");
    let write = ["sh", "-c", "cat >/tmp/broken.toml"];
    lab.run(1, &write, document.as_bytes(), Duration::from_secs(20))?.ok()?;
    lab.ctl(1, &["vm", "create", "-f", "/tmp/broken.toml"])?;
    refused(&lab, 1, &["vm", "start", "broken"], &["kernel"])?;
    ensure!(lab.vm(1, "broken")?.phase != "started", "a VM without a kernel runs");
    lab.ctl(1, &["vm", "delete", "broken"])?;
    // A disk that was cut to an odd length behind the cluster's back.
    lab.sh(1, "truncate -s 1000 /shared/pool/web.raw")?;
    refused(&lab, 1, &["vm", "start", "web"], &["web.raw"])?;
    lab.sh(1, "truncate -s 16M /shared/pool/web.raw")?;

    // Joining.
    let token: CreateTokenResponse = lab.ctl_json(1, &["cluster", "token", "create"])?;
    refused(&lab, 2, &["cluster", "join", &token.token], &["already"])?;
    refused(&lab, 1, &["cluster", "init", "--name", "again"], &["already"])?;

    // Garbage on the listening ports.
    for port in [7400, 7401] {
        lab.sh(2, &format!("head -c 65536 /dev/urandom | timeout 5 nc 10.77.0.1 {port} || true"))?;
        lab.sh(
            2,
            &format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 5 nc 10.77.0.1 {port} || true"),
        )?;
    }
    lab.wait_healthy(2)?;

    // A second agent on the same data folder.
    let output = lab.run(
        1,
        &["timeout", "20", "node-agent", "--config", "/etc/holdfast/node-agent.toml"],
        b"",
        BOOT,
    )?;
    ensure!(output.code != 0 && output.code != 143, "a second agent ran: {output:?}");

    // All is as it was.
    lab.ctl(1, &["vm", "start", "web"])?;
    lab.wait_single_copy(1, &web)?;
    lab.stop_and_check(1, &web)?;
    lab.down()
}
