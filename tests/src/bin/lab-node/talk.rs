//! A client that never stops talking to a guest over one TCP connection: says how long the longest
//! silence was and how often the connection had to be made again. And a question asked until it
//! is answered.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::signal::{SigHandler, Signal, signal};
use tests::guest::client::TalkReport;

#[derive(Args)]
pub(crate) struct Options {
    /// The guest's probe, host:port.
    address: SocketAddr,
    /// Stop after this many seconds; 0: at a signal.
    #[arg(long, default_value_t = 0)]
    seconds: u64,
    /// Milliseconds between two words.
    #[arg(long, default_value_t = 10)]
    every_ms: u64,
    /// Keep the newest report in this file too (replaced whole, each second).
    #[arg(long)]
    report: Option<PathBuf>,
}

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_signal: i32) {
    STOP.store(true, Ordering::Relaxed);
}

/// Talks until it is told to stop.
pub(crate) fn talk(options: &Options) -> anyhow::Result<()> {
    for ended_by in [Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { signal(ended_by, SigHandler::Handler(stop)) }?;
    }
    let started = Instant::now();
    let mut report = TalkReport::default();
    let mut last_answer: Option<Instant> = None;
    let mut last_report = started;
    let over = || {
        STOP.load(Ordering::Relaxed)
            || (options.seconds > 0 && started.elapsed().as_secs() >= options.seconds)
    };
    while !over() {
        let Ok(stream) = TcpStream::connect_timeout(&options.address, Duration::from_secs(1))
        else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        report.connections += 1;
        stream.set_nodelay(true)?;
        // A live migration must not break the connection, however long TCP has to wait for it.
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        while !over() {
            let word = format!("echo {}\n", report.answers);
            let mut answer = String::new();
            let spoke =
                writer.write_all(word.as_bytes()).and_then(|()| reader.read_line(&mut answer));
            if !matches!(spoke, Ok(1..)) {
                break;
            }
            if answer != word {
                report.wrong_answers += 1;
            }
            let now = Instant::now();
            if let Some(last) = last_answer.replace(now) {
                let silence = now.duration_since(last);
                report.longest_silence_ms = report
                    .longest_silence_ms
                    .max(u64::try_from(silence.as_millis()).unwrap_or(u64::MAX));
            }
            report.answers += 1;
            if now.duration_since(last_report) >= Duration::from_secs(1) {
                last_report = now;
                save(options, &report)?;
            }
            std::thread::sleep(Duration::from_millis(options.every_ms));
        }
    }
    save(options, &report)?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// Prints the probe's status as soon as it gives one.
pub(crate) fn await_status(address: SocketAddr, seconds: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        match ask(address, "status\n") {
            Ok(answer) if answer.starts_with('{') => {
                print!("{answer}");
                return Ok(());
            }
            answer => anyhow::ensure!(
                Instant::now() < deadline,
                "no answer from {address} in {seconds} s: {answer:?}"
            ),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ask(address: SocketAddr, question: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_millis(500))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(question.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer)
}

fn save(options: &Options, report: &TalkReport) -> anyhow::Result<()> {
    let Some(path) = &options.report else { return Ok(()) };
    let new = path.with_extension("new");
    std::fs::write(&new, serde_json::to_vec(report)?)?;
    std::fs::rename(new, path)?;
    Ok(())
}
