//! Answers lines: `echo …` (the same line back), `boot-id`, `uptime` (milliseconds), `status`
//! (JSON of [`tests::guest::client::Status`]).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use crate::{Shared, boot_id, clock_ns};

/// Longest line, bytes.
const LINE_MAX: u64 = 4096;

/// Serves for ever, a thread for each connection.
pub(crate) fn serve(shared: &Arc<Shared>) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", tests::guest::PORT))?;
    println!("guest-probe: serving {} ms after boot", clock_ns(libc::CLOCK_BOOTTIME) / 1_000_000);
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            // A client that went away needs no answer.
            let _ = converse(&shared, stream);
        });
    }
    Ok(())
}

fn converse(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(LINE_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match line.trim_end() {
            echo if echo.starts_with("echo ") => line,
            "boot-id" => format!("{}\n", boot_id()),
            "uptime" => format!("{}\n", clock_ns(libc::CLOCK_BOOTTIME) / 1_000_000),
            "status" => format!("{}\n", serde_json::to_string(&shared.status())?),
            other => format!("error: unknown command {other:?}\n"),
        };
        stream.write_all(answer.as_bytes())?;
    }
}
