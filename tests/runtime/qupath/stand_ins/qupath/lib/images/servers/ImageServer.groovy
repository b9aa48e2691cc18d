package qupath.lib.images.servers

class ImageServer {

    URI uri
    int width
    int height
    double um
    boolean closed = false

    Collection<URI> getURIs() { [uri] }

    int getWidth() { width }

    int getHeight() { height }

    Metadata getMetadata() { new Metadata(name: uri.path.tokenize('/').last()) }

    Calibration getPixelCalibration() { new Calibration(um: um) }

    void close() { closed = true }

    static class Metadata {

        String name

        String getName() { name }

    }

    static class Calibration {

        double um

        boolean hasPixelSizeMicrons() { !Double.isNaN(um) }

        double getAveragedPixelSizeMicrons() { um }

    }

}
