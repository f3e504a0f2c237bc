//! `clusterctl image`: kernels, initramfs, firmware and disks in storage pools.

use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use proto::v1;
use proto::v1::storage_client::StorageClient;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Copy a file into a pool; it appears there whole or not at all
    #[command(
        after_help = "Examples:\n  clusterctl image import /boot/vmlinuz-6.1.0-amd64 --pool shared --name vmlinuz\n  clusterctl image import debian.raw --pool shared --kind disk"
    )]
    Import {
        /// The file
        file: PathBuf,
        /// The pool
        #[arg(long)]
        pool: String,
        /// Its name in the pool; the file's own where absent
        #[arg(long)]
        name: Option<String>,
        /// What it is; told from its content where absent
        #[arg(long)]
        kind: Option<Kind>,
    },
    /// A pool's images
    #[command(
        visible_alias = "ls",
        after_help = "Examples:\n  clusterctl image list --pool shared"
    )]
    List {
        /// Of this pool only
        #[arg(long, default_value = "", hide_default_value = true)]
        pool: String,
    },
    /// Delete an image that no VM uses
    #[command(
        visible_alias = "rm",
        after_help = "Examples:\n  clusterctl image delete shared/old-vmlinuz"
    )]
    Delete {
        /// pool/name
        #[arg(value_parser = parse_image)]
        image: (String, String),
    },
}

/// Kinds of images.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    Kernel,
    Initrd,
    Firmware,
    Disk,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Firmware => "firmware",
            Self::Disk => "disk",
        }
    }
}

fn parse_image(text: &str) -> Result<(String, String), proto::InvalidImage> {
    proto::parse_image(text).map(|(pool, name)| (pool.to_string(), name.to_owned()))
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = StorageClient::new(session.channel.clone());
    let format = session.global.output;
    match command {
        Command::Import { file, pool, name, kind } => {
            let name = match name {
                Some(name) => name,
                None => own_name(&file)?,
            };
            let kind = kind.map_or(String::new(), |kind| kind.word().to_owned());
            let header = v1::Image { pool, name, kind, ..v1::Image::default() };
            let image = import(session, &file, header).await?;
            output::print(format, &image, |image| {
                let size = output::size(image.size_bytes);
                format!(
                    "{}/{} ({}, {size})\nSHA-256 {}",
                    image.pool, image.name, image.kind, image.sha256
                )
            })
        }
        Command::List { pool } => {
            let request = v1::ListImagesRequest { pool };
            let images = session.call("list images", client.list_images(request)).await?;
            output::print(format, &images, |images| list_table(&images.images))
        }
        Command::Delete { image: (pool, name) } => {
            let what = format!("delete image {pool}/{name}");
            let request = v1::DeleteImageRequest { pool, name };
            let deleted = session.call(&what, client.delete_image(request)).await?;
            output::print(format, &deleted, |_| format!("done: {what}"))
        }
    }
}

/// The name that a file has in a pool if nothing else is said.
fn own_name(file: &Path) -> Result<String, Failure> {
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match proto::parse_image(&format!("pool/{name}")) {
        Ok(_) => Ok(name),
        Err(_) => Err(Failure::new(
            Exit::Usage,
            format!("{} cannot be an image's name in a pool", file.display()),
        )
        .why("it has other characters than a-z, A-Z, 0-9, ., _ and -, or begins with a dot")
        .remedy("give one with --name")),
    }
}

/// Bytes in one message: well below gRPC's limit, large enough to keep the link busy.
const CHUNK: usize = 256 << 10;

async fn import(session: &Session, file: &Path, header: v1::Image) -> Result<v1::Image, Failure> {
    let failed = |error: std::io::Error| Failure::file("read", file, &error);
    let mut source = tokio::fs::File::open(file).await.map_err(failed)?;
    let metadata = source.metadata().await.map_err(failed)?;
    if !metadata.is_file() {
        let error =
            std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file");
        return Err(failed(error));
    }
    let size_bytes = metadata.len();
    let what = format!("import {} as {}/{}", file.display(), header.pool, header.name);
    let header = v1::Image { size_bytes, ..header };
    let bar = ProgressBar::new(size_bytes);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {binary_bytes} of {binary_total_bytes}, {eta}")
    {
        bar.set_style(style);
    }
    let (messages, stream) = mpsc::channel(4);
    let send = async {
        let first = v1::ImportImageRequest { header: Some(header), data: Vec::new() };
        // A closed channel means that the server has answered already: its answer says why.
        if messages.send(first).await.is_err() {
            return Ok(());
        }
        loop {
            let mut data = vec![0; CHUNK];
            let count = source.read(&mut data).await?;
            data.truncate(count);
            if count == 0
                || messages.send(v1::ImportImageRequest { header: None, data }).await.is_err()
            {
                return Ok(());
            }
            bar.inc(count as u64);
        }
    };
    let mut client = StorageClient::new(session.channel.clone());
    let answer = client.import_image(ReceiverStream::new(stream));
    tokio::pin!(answer);
    let image = tokio::select! {
        answer = &mut answer => answer,
        // Dropping the half-sent stream on a read error aborts the import at the server.
        sent = send => {
            sent.map_err(failed)?;
            drop(messages);
            answer.await
        }
    };
    bar.finish_and_clear();
    image.map(tonic::Response::into_inner).map_err(|status| Failure::status(&what, &status))
}

fn list_table(images: &[v1::Image]) -> String {
    let rows = images.iter().map(|image| {
        let reference = format!("{}/{}", image.pool, image.name);
        let sha256 = image.sha256.chars().take(16).collect::<String>();
        let kind = if image.kind.is_empty() { "unknown" } else { &image.kind };
        [reference, kind.to_owned(), output::size(image.size_bytes), output::or_dash(&sha256)]
    });
    output::columns(["IMAGE", "KIND", "SIZE", "SHA-256"], rows)
}
